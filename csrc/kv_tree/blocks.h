// Which blocks of the pool are taken, by whom, under which weights; the twin of block_list.py.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <vector>

#include "kv_tree/error.h"

namespace appo {

constexpr int64_t kBlock = 16;     // positions per block
constexpr int64_t kFree = -1;      // owner of a block nobody has
constexpr int64_t kDeferred = -2;  // … of one given back that may still be read

// Memory for `size` items in all, growing as push_back does. May throw; then nothing has changed.
template <typename T>
void make_room(std::vector<T>* list, size_t size) {
  if (size > list->capacity()) list->reserve(std::max(size, 2 * list->capacity()));
}

// Block ids 0, 1, …, each free or owned by one node, the only one that may write it. The lowest
// free id is taken first.
class BlockList {
 public:
  explicit BlockList(int64_t limit) : limit_(limit) {}  // -1: no limit

  std::vector<int64_t> owner, version;  // per block: node, weights version of what is in it
  std::vector<int64_t> free_ids;        // a heap, lowest first
  std::vector<int64_t> deferred;        // given back, not free before settle()
  int64_t used = 0, peak = 0;

  int64_t capacity() const { return limit_ < 0 ? static_cast<int64_t>(owner.size()) : limit_; }
  int64_t free() const { return capacity() - used; }
  int64_t lacking(int64_t count) const {
    return limit_ < 0 ? 0 : std::max<int64_t>(0, count - free());
  }

  // 1 + the highest block in use.
  int64_t span() {
    while (span_ > 0 && owner[span_ - 1] == kFree) --span_;
    return span_;
  }

  // Memory for taking `count` blocks and for giving back whatever was taken, so that these cannot
  // fail. May throw.
  void reserve(int64_t count) {
    const size_t made = std::max<int64_t>(0, count - static_cast<int64_t>(free_ids.size()));
    for (auto* list : {&owner, &version, &free_ids, &deferred})
      make_room(list, owner.size() + made);
  }

  // `count` blocks for a node go to the end of `to`; the caller has made sure that they are there,
  // and reserved memory here and in `to`.
  void take(int64_t count, int64_t node, int64_t tag, std::vector<int64_t>* to) {
    for (int64_t i = 0; i < count; ++i) {
      int64_t block = static_cast<int64_t>(owner.size());
      if (free_ids.empty()) {
        owner.push_back(kFree);
        version.push_back(tag);
      } else {
        std::pop_heap(free_ids.begin(), free_ids.end(), std::greater<int64_t>());
        block = free_ids.back();
        free_ids.pop_back();
      }
      owner[block] = node;
      version[block] = tag;
      span_ = std::max(span_, block + 1);
      to->push_back(block);
    }
    used += count;
    peak = std::max(peak, used);
  }

  // A block of a node becomes free with the next settle().
  void give_back(int64_t block, int64_t node) {
    if (owner[block] != node) {
      fail("EngineError", "block ", block, " is given back by node ", node, " but belongs to ",
           owner[block], "; it was freed before: report this");
    }
    owner[block] = kDeferred;
    deferred.push_back(block);
  }

  // No forward pass is under way: what was given back may be taken again.
  void settle() {
    for (int64_t block : deferred) {
      owner[block] = kFree;
      free_ids.push_back(block);
      std::push_heap(free_ids.begin(), free_ids.end(), std::greater<int64_t>());
    }
    used -= static_cast<int64_t>(deferred.size());
    deferred.clear();
  }

 private:
  int64_t limit_, span_ = 0;
};

}  // namespace appo

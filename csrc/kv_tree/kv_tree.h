// The segment tree over a block pool: what its parts share.
//
//   error.h      what is thrown
//   blocks.h     which blocks are taken, by whom
//   kv_tree.cpp  sequences: add, fork, extend, truncate, release, evict, new weights
//   plan.cpp     rows of the next forward pass, commit, abort
//   layout.cpp   the tables of these rows
//   check.cpp    every invariant, recomputed
//   python.cpp   exported functions
//
// appo/rollout/native/tree/segment_tree.py is the plain definition and says what each operation does;
// the two give the same answers, tables and messages. Everything here is bookkeeping on whole
// numbers: no KV, and no threads: callers hold Python's interpreter lock. A call that throws, for
// want of memory too, has changed nothing.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

#include "kv_tree/blocks.h"

namespace appo {

// One segment. Own position i is absolute position base + i.
struct Node {
  int64_t id, base, level;  // level: ancestors it has
  Node* parent;
  size_t place = 0;            // among the parent's children
  int64_t seq = -1, refs = 0;  // handle (-1: none); children + handle
  int64_t kv = 0;              // own positions with KV
  int64_t planned = 0;         // how many there will be when the open layout is committed (0: none)
  int64_t seen = 0;            // how many had KV under these weights, evicted ones included
  int64_t lost =
      0;  // how many had KV under older weights; those from `seen` on have not been run since
  int64_t unit = -1, visit = 0;  // unit of the plan numbered `visit` (an older number: none)
  int64_t checked = 0;           // plan in which its blocks were looked at
  std::vector<int64_t> tokens, blocks;
  std::vector<Node*> children;

  int64_t size() const { return static_cast<int64_t>(tokens.size()); }
  int64_t length() const { return base + size(); }
  int64_t reach() const { return kv > planned ? kv : planned; }
  bool outdated(int64_t count) const {
    return std::min(lost, count) > seen;
  }  // one of the first `count`
  int64_t slot(int64_t i) const { return blocks[i / kBlock] * kBlock + i % kBlock; }
  int64_t inherited() const;  // own positions that some child reads
};

// A node and how many of its own positions are on a path.
struct Step {
  Node* node;
  int64_t count;
};

// Run own positions start … start + count - 1; the last row's token is sampled for `seq` (-1: it is
// not).
struct Unit {
  Node* node;
  int64_t id, start, count, seq,
      row;  // id: of the node, which may be gone when the rows have been run
};

// The tables of layout.py; vectors are kept from one plan to the next.
struct Tables {
  std::vector<int64_t> ids, positions, slots, segments, blocks, reads, limits, out_rows, seqs,
      rows_of;
  int64_t decode_rows = 0;

  std::vector<const std::vector<int64_t>*> all() const {
    return {&ids,   &positions, &slots,    &segments, &blocks,
            &reads, &limits,    &out_rows, &seqs,     &rows_of};
  }
};

class SegmentTree {
 public:
  explicit SegmentTree(int64_t max_blocks) : blocks_(max_blocks) {}

  int64_t add(const int64_t* ids, int64_t count);
  int64_t fork(int64_t seq, int64_t at);
  void extend(int64_t seq, const int64_t* ids, int64_t count);
  void truncate(int64_t seq, int64_t length);
  void release(int64_t seq);
  int64_t evict(int64_t seq);
  int64_t evict_path(int64_t seq, const std::unordered_map<int64_t, int64_t>& keep);
  void new_version(int64_t version);

  Node* get(int64_t seq) const;
  const Node& node(int64_t id, const char* what) const;
  int64_t kv(int64_t seq) const;
  bool stale(const Node* node,
             int64_t end) const;             // something that path positions before `end` read
  std::vector<Step> path(Node* node) const;  // root first

  // 0: a layout is open and tables() are its; otherwise the number of blocks there are too few.
  int64_t plan(const int64_t* seqs, int64_t count, int64_t budget);
  int64_t layout(const int64_t* units, int64_t count);        // (node, start, count) each
  int64_t open_layout() const { return open_ ? visit_ : 0; }  // its number; 0: none is open
  void commit(int64_t number);
  void abort(int64_t number);
  int64_t need(const int64_t* seqs, const int64_t* ends, int64_t count);
  const Tables& tables() const { return tables_; }

  void check(const int64_t* slots, int64_t rows) const;  // slots of the open layout

  BlockList& blocks() { return blocks_; }
  int64_t version = 0, tokens_held = 0;
  int64_t live_sequences() const { return static_cast<int64_t>(seqs_.size()); }
  int64_t live_nodes() const { return static_cast<int64_t>(nodes_.size()); }

 private:
  Node* grow(Node* parent, int64_t base, const int64_t* ids, int64_t count);
  int64_t name(Node* node);
  void drop(Node* node);
  void cut(Node* node, int64_t size, int64_t count);
  int64_t keep(Node* node, int64_t count);
  void check_fresh(const Node* node, int64_t end, const char* what) const;
  void check_closed(const char* what) const;
  void check_open(int64_t number, const char* what) const;

  int64_t done(const Node* node) const;
  Unit& unit_of(Node* node, int64_t start);
  void more_rows(Node* node, int64_t count, int64_t* budget);
  int64_t settle();
  void lay_out();
  void close();
  void cancel();

  void check_node(const Node& node) const;
  void check_blocks(const std::unordered_map<int64_t, int64_t>& holder) const;
  void check_slots(const int64_t* slots, int64_t rows) const;

  BlockList blocks_;
  std::unordered_map<int64_t, std::unique_ptr<Node>> nodes_;
  std::unordered_map<int64_t, Node*> seqs_;
  int64_t next_node_ = 0, next_seq_ = 0, visit_ = 0;
  bool open_ = false;
  std::vector<Unit> units_;  // of the plan being made, then of the open layout
  Tables tables_;
};

// KV blocks that so many positions take.
inline int64_t blocks_for(int64_t positions) { return (positions + kBlock - 1) / kBlock; }

}  // namespace appo

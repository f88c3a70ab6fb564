// Sequences of the segment tree: see kv_tree.h and segment_tree.py.

#include "kv_tree/kv_tree.h"

#include <algorithm>
#include <utility>

namespace appo {

namespace {

int64_t token_at(const Node* node, int64_t position) {
  while (position < node->base) node = node->parent;
  return node->tokens[position - node->base];
}

}  // namespace

int64_t Node::inherited() const {
  int64_t most = 0;
  for (const Node* child : children) most = std::max(most, child->base - base);
  return most;
}

int64_t SegmentTree::add(const int64_t* ids, int64_t count) {
  if (count < 1) fail("EngineError", "add: ids is empty; a sequence needs at least one token");
  return name(grow(nullptr, 0, ids, count));
}

int64_t SegmentTree::fork(int64_t seq, int64_t at) {
  Node* node = get(seq);
  if (at < 1 || at > node->length()) {
    fail("EngineError", "fork(seq=", seq, ", at=", at, "): at must be in 1 … ", node->length(),
         ", the sequence's length");
  }
  check_fresh(node, at - 1, "fork");
  const int64_t token = token_at(node, at - 1);
  return name(grow(node, at - 1, &token, 1));
}

void SegmentTree::extend(int64_t seq, const int64_t* ids, int64_t count) {
  std::vector<int64_t>& tokens = get(seq)->tokens;
  tokens.insert(tokens.end(), ids, ids + count);
}

void SegmentTree::truncate(int64_t seq, int64_t length) {
  Node* node = get(seq);
  if (length < 1 || length > node->length()) {
    fail("EngineError", "truncate(seq=", seq, ", length=", length, "): length must be in 1 … ",
         node->length(), ", the sequence's length");
  }
  if (length == node->length()) return;
  if (length > node->base && node->inherited() < length - node->base) {
    cut(node, length - node->base, length - node->base - 1);
    return;
  }
  const int64_t token = token_at(node, length - 1);
  Node* fresh = grow(node, length - 1, &token, 1);
  fresh->seq = seq;
  ++fresh->refs;
  seqs_[seq] = fresh;
  node->seq = -1;
  drop(node);
}

void SegmentTree::release(int64_t seq) {
  Node* node = get(seq);
  seqs_.erase(seq);
  node->seq = -1;
  drop(node);
}

int64_t SegmentTree::evict(int64_t seq) {
  Node* node = get(seq);
  return keep(node, node->inherited());
}

int64_t SegmentTree::evict_path(int64_t seq, const std::unordered_map<int64_t, int64_t>& stay) {
  int64_t freed = 0;
  for (Node* node = get(seq); node != nullptr; node = node->parent) {
    const auto named = stay.find(node->id);
    int64_t most = named == stay.end() ? 0 : std::max<int64_t>(0, named->second);
    for (const Node* child : node->children) {
      if (child->reach() > 0) most = std::max(most, child->base - node->base);
    }
    freed += keep(node, most);
  }
  return freed;
}

void SegmentTree::new_version(int64_t to) {
  version = to;
  for (auto& [id, node] : nodes_) {
    keep(node.get(), 0);
    const int64_t read =
        node->seq < 0 ? node->size() : node->size() - 1;  // a last token is run again
    node->lost = std::max(node->lost, std::min(node->seen, read));
    node->seen = 0;
  }
}

Node* SegmentTree::get(int64_t seq) const {
  const auto found = seqs_.find(seq);
  if (found == seqs_.end()) {
    const bool known = seq >= 0 && seq < next_seq_;
    fail("EngineError", "sequence ", seq, known ? " was released" : " is unknown",
         "; use a live handle");
  }
  return found->second;
}

const Node& SegmentTree::node(int64_t id, const char* what) const {
  const auto found = nodes_.find(id);
  if (found == nodes_.end()) {
    fail("EngineError", what, ": node ", id, " is unknown; take ids from path()");
  }
  return *found->second;
}

int64_t SegmentTree::kv(int64_t seq) const {
  int64_t total = 0;
  for (const Step& step : path(get(seq))) {
    total += std::min(step.node->kv, step.count);
    if (step.node->kv < step.count) break;
  }
  return total;
}

bool SegmentTree::stale(const Node* node, int64_t end) const {
  for (; node != nullptr; node = node->parent) {
    if (node->outdated(end - node->base)) return true;
    end = std::min(end, node->base);
  }
  return false;
}

std::vector<Step> SegmentTree::path(Node* node) const {
  std::vector<Step> steps(node->level + 1);
  int64_t count = node->size();
  for (size_t i = steps.size(); i-- > 0;) {
    steps[i] = {node, count};
    if (i > 0) count = node->base - node->parent->base;
    node = node->parent;
  }
  return steps;
}

void SegmentTree::check_fresh(const Node* node, int64_t end, const char* what) const {
  if (!stale(node, end)) return;
  fail("StaleWeightsError", what, "(seq=", node->seq, "): its KV was computed before version ",
       version, "; call score([", node->seq, "]) first, or start again from the prompt");
}

// A node with these tokens, under the nearest ancestor of which it inherits something. What may
// throw comes first.
Node* SegmentTree::grow(Node* parent, int64_t base, const int64_t* ids, int64_t count) {
  while (parent != nullptr && base <= parent->base) parent = parent->parent;
  if (parent != nullptr) make_room(&parent->children, parent->children.size() + 1);
  auto made = std::make_unique<Node>();
  made->tokens.assign(ids, ids + count);
  Node* node = made.get();
  node->id = next_node_;
  nodes_.emplace(next_node_, std::move(made));
  ++next_node_;
  node->base = base;
  node->level = parent == nullptr ? 0 : parent->level + 1;
  node->parent = parent;
  if (parent != nullptr) {
    node->place = parent->children.size();
    parent->children.push_back(node);
    ++parent->refs;
  }
  return node;
}

// A handle for a new node, which goes again if there is no memory for one.
int64_t SegmentTree::name(Node* node) {
  ++node->refs;
  try {
    seqs_.emplace(next_seq_, node);
  } catch (...) {
    drop(node);
    throw;
  }
  node->seq = next_seq_++;
  return node->seq;
}

// One reference less; what nobody refers to goes, what only children need is trimmed to what they
// inherit.
void SegmentTree::drop(Node* node) {
  while (node != nullptr) {
    if (--node->refs > 0) {
      if (node->seq >= 0) return;
      const int64_t most = node->inherited();
      cut(node, most, most);
      return;
    }
    keep(node, 0);
    Node* parent = node->parent;
    if (parent != nullptr) {
      Node* last = parent->children.back();
      parent->children[node->place] = last;
      last->place = node->place;
      parent->children.pop_back();
    }
    nodes_.erase(node->id);
    node = parent;
  }
}

// Drops own tokens from `size` on, and from `count` on all that is known of their KV.
void SegmentTree::cut(Node* node, int64_t size, int64_t count) {
  node->tokens.resize(size);
  keep(node, count);
  node->seen = std::min(node->seen, count);
  node->lost = std::min(node->lost, count);
}

// Forgets the KV of own positions from `count` on; returns the number of blocks that gives back.
int64_t SegmentTree::keep(Node* node, int64_t count) {
  tokens_held -= std::max<int64_t>(0, node->kv - count);
  node->kv = std::min(node->kv, count);
  node->planned = std::min(node->planned, count);
  if (node->planned <= node->kv) node->planned = 0;
  const int64_t left = blocks_for(node->reach()), there = static_cast<int64_t>(node->blocks.size());
  if (left >= there) return 0;
  for (int64_t i = left; i < there; ++i) blocks_.give_back(node->blocks[i], node->id);
  node->blocks.resize(left);
  if (!open_) blocks_.settle();
  return there - left;
}

}  // namespace appo

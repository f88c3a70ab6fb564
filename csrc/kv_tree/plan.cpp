// Rows of the next forward pass: see kv_tree.h and segment_tree.py.

#include <algorithm>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "kv_tree/kv_tree.h"

namespace appo {

void SegmentTree::check_closed(const char* what) const {
  if (open_) fail("EngineError", what, ": a layout is open; commit or abort it first");
}

void SegmentTree::check_open(int64_t number, const char* what) const {
  if (open_ && number == visit_) return;
  fail("EngineError", what, ": this layout is not open; each one is committed or aborted once");
}

// Own positions that have KV or are planned.
int64_t SegmentTree::done(const Node* node) const {
  if (node->visit != visit_) return node->kv;
  const Unit& unit = units_[node->unit];
  return std::max(node->kv, unit.start + unit.count);
}

// The unit of a node, made without rows if it has none.
Unit& SegmentTree::unit_of(Node* node, int64_t start) {
  if (node->visit != visit_) {
    node->visit = visit_;
    node->unit = static_cast<int64_t>(units_.size());
    units_.push_back({node, node->id, start, 0, -1, 0});
  }
  return units_[node->unit];
}

// Own positions of a node up to `count`, as far as the budget goes.
void SegmentTree::more_rows(Node* node, int64_t count, int64_t* budget) {
  const int64_t from = done(node), rows = std::min(count - from, *budget);
  if (rows <= 0) return;
  unit_of(node, from).count += rows;
  *budget -= rows;
}

int64_t SegmentTree::plan(const int64_t* seqs, int64_t count, int64_t budget) {
  check_closed("plan");
  std::unordered_set<int64_t> named;
  for (int64_t i = 0; i < count; ++i) {  // all that can be wrong, before anything is noted down
    const Node* leaf = get(seqs[i]);
    if (!named.insert(seqs[i]).second) {
      fail("EngineError", "plan: sequence ", seqs[i], " is named twice; name it once");
    }
    check_fresh(leaf, leaf->length(), "plan");
  }

  ++visit_;
  units_.clear();
  int64_t decode_rows = 0;
  for (int64_t i = 0; i < count; ++i) {
    const std::vector<Step> steps = path(get(seqs[i]));
    size_t ready = 0;
    for (; ready + 1 < steps.size(); ++ready) {
      more_rows(steps[ready].node, steps[ready].count, &budget);
      if (done(steps[ready].node) < steps[ready].count) break;
    }
    if (ready + 1 < steps.size()) continue;  // the budget ended among its ancestors
    Node* leaf = steps.back().node;
    const int64_t own = leaf->size(), from = std::min(done(leaf), own - 1);
    if (own - from == 1) {
      ++unit_of(leaf, from).count;
      ++decode_rows;
    } else {
      more_rows(leaf, own, &budget);
    }
    if (done(leaf) >= own) unit_of(leaf, own).seq = seqs[i];
  }
  tables_.decode_rows = decode_rows;
  return settle();
}

int64_t SegmentTree::layout(const int64_t* units, int64_t count) {
  check_closed("layout");
  ++visit_;
  units_.clear();
  for (int64_t i = 0; i < count; ++i) {
    const int64_t id = units[3 * i], start = units[3 * i + 1], rows = units[3 * i + 2];
    const auto found = nodes_.find(id);
    Node* node = found == nodes_.end() ? nullptr : found->second.get();
    if (node == nullptr || node->visit == visit_) {
      fail("EngineError", "layout: node ", id, " is ", node == nullptr ? "unknown" : "named twice",
           "; take ids from path(), each once");
    }
    if (rows < 1 || start < 0 || start > node->kv || start + rows > node->size()) {
      fail("EngineError", "layout: rows ", start, " … ", start + rows - 1, " of node ", id,
           "; it has ", node->size(), " tokens and KV of ", node->kv,
           ", rows start where KV ends or before");
    }
    unit_of(node, start).count = rows;
  }
  for (const Unit& unit : units_) {
    for (const Node* below = unit.node; below->parent != nullptr; below = below->parent) {
      const Node* node = below->parent;
      const int64_t reads = below->base - node->base, there = done(node);
      if (there >= reads) continue;
      fail(node->outdated(reads) ? "StaleWeightsError" : "EngineError", "layout: node ", unit.id,
           " reads ", reads, " positions of node ", node->id, ", which has KV of ", there,
           " under version ", version, "; run these first");
    }
  }
  tables_.decode_rows = 0;
  return settle();
}

// Takes the blocks that the units fill and opens their layout, or tells how many are lacking.
int64_t SegmentTree::settle() {
  const auto more = [](const Unit& unit) {
    const int64_t there = static_cast<int64_t>(unit.node->blocks.size());
    return std::max<int64_t>(0, blocks_for(unit.start + unit.count) - there);
  };
  int64_t total = 0;
  for (const Unit& unit : units_) total += more(unit);
  const int64_t lacking = blocks_.lacking(total);
  if (lacking > 0) return lacking;
  for (const Unit& unit : units_) {
    for (Node* node = unit.node; node != nullptr && node->checked != visit_; node = node->parent) {
      node->checked = visit_;
      for (int64_t block : node->blocks) {
        if (blocks_.version[block] == version) continue;
        fail("StaleWeightsError", "block ", block, " of node ", node->id, " holds KV of version ",
             blocks_.version[block], ", the weights are version ", version,
             "; it must not be read");
      }
    }
  }
  blocks_.reserve(total);  // all memory before anything changes
  for (const Unit& unit : units_)
    make_room(&unit.node->blocks, unit.node->blocks.size() + more(unit));
  for (const Unit& unit : units_) {
    Node* node = unit.node;
    const int64_t end = unit.start + unit.count;
    blocks_.take(more(unit), node->id, version, &node->blocks);
    node->planned = end > node->kv ? end : 0;
  }
  open_ = true;
  try {
    lay_out();
  } catch (...) {
    cancel();
    throw;
  }
  return 0;
}

void SegmentTree::commit(int64_t number) {
  check_open(number, "commit");
  for (const Unit& unit : units_) {
    if (nodes_.count(unit.id) == 0) continue;  // released meanwhile
    Node* node = unit.node;
    if (node->planned == 0) continue;
    tokens_held += node->planned - node->kv;
    node->kv = node->planned;
    node->planned = 0;
    node->seen = std::max(node->seen, node->kv);
  }
  close();
}

void SegmentTree::abort(int64_t number) {
  check_open(number, "abort");
  cancel();
}

// The rows of the open layout are not run: gives back what was taken for them.
void SegmentTree::cancel() {
  for (const Unit& unit : units_) {
    if (nodes_.count(unit.id) == 0) continue;
    unit.node->planned = 0;
    keep(unit.node, unit.node->kv);
  }
  close();
}

void SegmentTree::close() {
  open_ = false;
  blocks_.settle();
}

int64_t SegmentTree::need(const int64_t* seqs, const int64_t* ends, int64_t count) {
  std::unordered_map<const Node*, int64_t> want;
  for (int64_t i = 0; i < count; ++i) {
    const Node* node = get(seqs[i]);
    int64_t positions = ends[i] - 1 - node->base;
    for (; node != nullptr; node = node->parent) {
      int64_t& most = want[node];
      most = std::max(most, positions);
      if (node->parent != nullptr) positions = node->base - node->parent->base;
    }
  }
  int64_t total = 0;
  for (const auto& [node, positions] : want) {
    total +=
        std::max<int64_t>(0, blocks_for(positions) - static_cast<int64_t>(node->blocks.size()));
  }
  return total;
}

}  // namespace appo

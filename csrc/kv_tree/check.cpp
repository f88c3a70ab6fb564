// Everything that must hold between operations on a segment tree, recomputed from scratch; the twin
// of integrity.py.

#include <string>
#include <unordered_map>
#include <vector>

#include "kv_tree/kv_tree.h"

namespace appo {

namespace {

template <typename... Parts>
void must(bool holds, const Parts&... problem) {
  if (!holds) fail("EngineError", "segment tree: ", problem...);
}

std::string whose(int64_t owner) {
  if (owner == kFree) return "free";
  return owner == kDeferred ? "deferred" : "of node " + std::to_string(owner);
}

// Before a block under suspicion is looked up.
void must_be_there(int64_t block, const BlockList& blocks) {
  const int64_t made = static_cast<int64_t>(blocks.owner.size());
  must(block >= 0 && block < made, "there is no block ", block, ", only ", made);
}

}  // namespace

void SegmentTree::check(const int64_t* slots, int64_t rows) const {
  std::unordered_map<int64_t, int64_t> holder;  // block → node
  std::unordered_map<int64_t, int64_t>
      ends;  // node → own positions that the open layout runs, and those before
  if (open_) {
    for (const Unit& unit : units_) ends.emplace(unit.id, unit.start + unit.count);
  }
  int64_t refs = 0, live = live_sequences(), held = 0, named = 0;
  for (const auto& [id, node] : nodes_) {
    check_node(*node);
    const auto unit = ends.find(id);
    must(node->planned <= (unit == ends.end() ? 0 : unit->second), "node ", id, " is planned for ",
         node->planned, " positions, the open layout runs others");
    named += node->seq >= 0;
    for (int64_t block : node->blocks) {
      const auto [other, fresh] = holder.emplace(block, id);
      must(fresh, "block ", block, " is held by nodes ", other->second, " and ", id);
    }
    refs += node->refs;
    live += node->parent != nullptr;
    held += node->kv;
  }
  must(named == live_sequences(), live_sequences(), " handles are counted, ", named,
       " nodes have one");
  must(refs == live, refs, " references are counted, ", live, " are there");
  must(tokens_held == held, "tokens_held is ", tokens_held, ", nodes hold ", held);
  check_blocks(holder);
  if (open_) check_slots(slots, rows);
}

void SegmentTree::check_node(const Node& node) const {
  const std::string name = "node " + std::to_string(node.id);
  const Node* parent = node.parent;
  const int64_t refs = static_cast<int64_t>(node.children.size()) + (node.seq >= 0),
                inherited = node.inherited();
  must(node.refs == refs && refs > 0, name, " counts ", node.refs, " references, ", refs,
       " are there");
  must(node.size() >= 1 && node.size() >= inherited, name, " lacks tokens that children inherit");
  const auto handle = seqs_.find(node.seq);
  must(node.seq < 0 || (handle != seqs_.end() && handle->second == &node), "handle ", node.seq,
       " is not of ", name);
  must(node.seq >= 0 || node.size() == inherited, name, " has tokens that nobody needs");
  must(node.level == (parent == nullptr ? 0 : parent->level + 1), name, " is not at level ",
       node.level);
  if (parent != nullptr) {
    must(node.place < parent->children.size() && parent->children[node.place] == &node, name,
         " is missing among its parent's children");
    must(node.base > parent->base, name, " inherits nothing from its parent ", parent->id);
  }

  must(node.kv >= 0 && node.kv <= node.seen && node.seen <= node.size(), name,
       " has KV of positions it has not");
  must(node.planned == 0 || (node.kv < node.planned && node.planned <= node.size()), name,
       " is planned wrongly");
  must(node.lost >= 0 && node.lost <= node.size(), name, " has lost KV of positions it has not");
  const int64_t there = static_cast<int64_t>(node.blocks.size()),
                expected = blocks_for(node.reach());
  must(there == expected, name, " has ", there, " blocks, ", node.reach(), " positions need ",
       expected);
  for (int64_t block : node.blocks) {
    must_be_there(block, blocks_);
    const int64_t owner = blocks_.owner[block], tag = blocks_.version[block];
    must(owner == node.id, "block ", block, " of ", name, " is ", whose(owner),
         ": it was given back too early");
    must(tag == version, "block ", block, " of ", name, " holds KV of version ", tag, ", not ",
         version);
  }
  if (parent != nullptr && node.reach() > 0) {
    const int64_t reads = node.base - parent->base,
                  covered = node.kv > 0 ? parent->kv : parent->reach();
    must(covered >= reads, name, " reads ", reads, " positions of node ", parent->id,
         ", which has ", covered);
  }
}

void SegmentTree::check_blocks(const std::unordered_map<int64_t, int64_t>& holder) const {
  const int64_t blocks = static_cast<int64_t>(blocks_.owner.size());
  std::vector<int64_t> expected(blocks, 0), states(blocks, 0);
  for (const auto& [block, node] : holder) {
    expected[block] = node;
    ++states[block];
  }
  for (int64_t block : blocks_.deferred) {
    must_be_there(block, blocks_);
    expected[block] = kDeferred;
    ++states[block];
  }
  for (int64_t block : blocks_.free_ids) {
    must_be_there(block, blocks_);
    expected[block] = kFree;
    ++states[block];
  }
  must(open_ || blocks_.deferred.empty(), "blocks are deferred, but no layout is open");
  for (int64_t block = 0; block < blocks; ++block) {
    must(states[block] == 1, "block ", block, " is in ", states[block],
         " of: free list, deferred, held by a node");
    const int64_t owner = blocks_.owner[block];
    must(owner == expected[block], "block ", block, " is ", whose(owner), ", expected ",
         whose(expected[block]));
  }
  const int64_t used = static_cast<int64_t>(holder.size() + blocks_.deferred.size());
  must(blocks_.used == used, blocks_.used, " blocks are counted as used, ", used, " are");
  must(blocks_.used <= blocks_.capacity(), "more blocks are used than there may be");
  must(blocks_.used <= blocks_.peak, "the peak is below what is in use");
}

// Each row writes where its own node may, once, and never where KV is that somebody may read.
void SegmentTree::check_slots(const int64_t* slots, int64_t rows) const {
  int64_t expected = 0;
  for (const Unit& unit : units_) expected += unit.count;
  must(rows == expected, "the open layout has ", rows, " slots for ", expected, " rows");
  std::unordered_map<int64_t, int64_t> row_of;
  for (int64_t row = 0; row < rows; ++row) {
    must(slots[row] < 0 || row_of.emplace(slots[row], row).second,
         "two rows of the open layout write to one slot");
  }
  for (const Unit& unit : units_) {
    const auto found = nodes_.find(unit.id);
    const Node* node =
        found == nodes_.end() ? nullptr : found->second.get();  // null: it went meanwhile
    for (int64_t i = unit.start; i < unit.start + unit.count; ++i) {
      const int64_t row = unit.row + i - unit.start, slot = slots[row];
      if (node != nullptr && i < node->kv) {
        must(slot == -1, "position ", i, " of node ", unit.id, " has KV and would be overwritten");
      } else if (node != nullptr && i < node->planned) {
        must(slot == node->slot(i), "row ", row, " writes to slot ", slot, ", not its own");
      } else if (slot >= 0) {  // it will not count, but nobody else may have the block before the
                               // layout is closed
        must_be_there(slot / kBlock, blocks_);
        const int64_t owner = blocks_.owner[slot / kBlock];
        must(owner == unit.id || owner == kDeferred, "row ", row, " of node ", unit.id,
             " writes to block ", slot / kBlock, ", which is ", whose(owner));
      }
    }
  }
}

}  // namespace appo

// The tables of one forward pass: the twin of lay_out in layout.py, which says what they mean.

#include <algorithm>
#include <vector>

#include "kv_tree/kv_tree.h"

namespace appo {

namespace {

// Depth-first order: ancestors first, siblings by where they leave the parent, then by age.
bool before(const Node* a, const Node* b) {
  const Node *x = a, *y = b;
  while (x->level > y->level) x = x->parent;
  while (y->level > x->level) y = y->parent;
  if (x == y) return a->level < b->level;
  while (x->parent != y->parent) {
    x = x->parent;
    y = y->parent;
  }
  return x->base != y->base ? x->base < y->base : x->id < y->id;
}

// Rows first … last - 1 read at most `most` positions of a node.
struct Reader {
  const Node* node;
  int64_t first, last, most;
};

}  // namespace

void SegmentTree::lay_out() {
  Tables& t = tables_;
  for (auto* table : {&t.ids, &t.positions, &t.slots, &t.segments, &t.blocks, &t.reads, &t.limits,
                      &t.out_rows, &t.seqs, &t.rows_of}) {
    table->clear();
  }
  std::sort(units_.begin(), units_.end(),
            [](const Unit& a, const Unit& b) { return before(a.node, b.node); });

  // Rows, and who reads what. In this order the readers of a node are neighbours: while it is on
  // the path at its level its range grows, and once it is not it never comes back.
  std::vector<Reader> readers;
  std::vector<size_t> on_path;            // level → reader
  std::vector<std::vector<size_t>> used;  // unit → readers, root first
  int64_t row = 0;
  for (Unit& unit : units_) {
    Node* node = unit.node;
    unit.row = row;
    for (int64_t i = unit.start; i < unit.start + unit.count; ++i, ++row) {
      t.ids.push_back(node->tokens[i]);
      t.positions.push_back(node->base + i);
      t.slots.push_back(i < node->kv ? -1 : node->slot(i));
    }
    t.rows_of.insert(t.rows_of.end(), {unit.id, unit.row, unit.start, unit.count});
    if (unit.seq >= 0) {
      t.out_rows.push_back(row - 1);
      t.seqs.push_back(unit.seq);
    }
    std::vector<Step> steps = path(node);
    steps.back().count = unit.start + unit.count;
    on_path.resize(std::min(on_path.size(), steps.size()));
    for (size_t level = 0; level < steps.size(); ++level) {
      if (level < on_path.size() && readers[on_path[level]].node != steps[level].node)
        on_path.resize(level);
      if (level == on_path.size()) {
        on_path.push_back(readers.size());
        readers.push_back({steps[level].node, unit.row, row, 0});
      }
      Reader& reader = readers[on_path[level]];
      reader.last = row;
      reader.most = std::max(reader.most, steps[level].count);
    }
    used.push_back(on_path);
  }

  int64_t limits = 0;
  for (size_t i = 0; i < readers.size(); ++i) {
    const Reader& r = readers[i];
    t.segments.insert(t.segments.end(), {static_cast<int64_t>(t.blocks.size()), r.most});
    t.blocks.insert(t.blocks.end(), r.node->blocks.begin(),
                    r.node->blocks.begin() + blocks_for(r.most));
    t.reads.insert(t.reads.end(), {static_cast<int64_t>(i), r.first, r.last, limits});
    limits += r.last - r.first;
  }
  t.limits.resize(limits);
  for (size_t u = 0; u < units_.size(); ++u) {
    const Unit& unit = units_[u];
    const auto at = [&](size_t i) {
      return &t.limits[t.reads[4 * i + 3] + unit.row - readers[i].first];
    };
    for (size_t level = 0; level + 1 < used[u].size(); ++level) {
      const int64_t inherited =
          readers[used[u][level + 1]].node->base - readers[used[u][level]].node->base;
      std::fill_n(at(used[u][level]), unit.count, inherited);
    }
    int64_t* own = at(used[u].back());
    for (int64_t i = 0; i < unit.count; ++i) own[i] = unit.start + i + 1;
  }
}

}  // namespace appo

// Tree attention after the checks, and what forward and backward share: sizes, key blocks, who sees
// which block.
#pragma once

#include <algorithm>
#include <vector>

#include "common/scratch.h"
#include "common/units.h"
#include "tree_attention/tree_attention.h"

namespace appo {

// Rows of several heads, [tokens][heads][dim], the numbers of a head one after another; strides in
// elements.
struct Heads {
  const char* data;
  int64_t token_stride, head_stride;
};

struct TreeProblem {
  Dtype dtype;
  int64_t tokens, heads, kv_heads, dim;
  Heads q, k, v;
  const int32_t* ends;  // [tokens], i < ends[i] <= tokens, nested
  float scale;
  int64_t threads;
  const MatrixKernels* products;
  const TreeKernels* rows;
};

struct TreeGrads {
  Heads o, g;          // what forward returned, and the gradient that comes back
  const float* lse;    // [tokens][heads]
  const float* d_lse;  // the same, or null
  char *dq, *dk, *dv;  // contiguous, dtype of q
};

void tree_forward(const TreeProblem& p, char* out,
                  float* lse);  // out[tokens][heads][dim], lse[tokens][heads]
void tree_backward(const TreeProblem& p, const TreeGrads& g);

inline const char* head_row(const TreeProblem& p, const Heads& x, int64_t token, int64_t head) {
  return x.data + (token * x.token_stride + head * x.head_stride) * bytes_of(p.dtype);
}

// Sizes of tiles and of their packed forms, in words of 32 bits unless it says otherwise.
struct TreeSizes {
  explicit TreeSizes(const TreeProblem& p)
      : pair(p.products->pair),
        panel(p.products->panel),
        width(round_up(p.dim, 32)),
        sum(round_up(p.dim, 16)),
        words(ceil_div(p.dim, pair)),
        row(width / pair),
        group(p.heads / p.kv_heads),
        queries(std::max<int64_t>(kTreeRows / group / 16 * 16, 16)),
        rows(round_up(queries * group, 2)),
        tiles(ceil_div(p.tokens, queries)),
        blocks(ceil_div(p.tokens, kTreeKeys)),
        dim_panels(ceil_div(p.dim, panel)),
        key_panel(kTreeKeys / pair * panel),
        keys_across(kTreeKeys * row),
        keys_along(dim_panels * key_panel) {}

  int64_t pair, panel;
  int64_t width, sum;      // numbers of a head, as fetched and as summed
  int64_t words, row;      // of a head that count, and of a fetched row
  int64_t group, queries;  // query heads per key head; queries per tile
  int64_t rows;            // per tile, most
  int64_t tiles, blocks, dim_panels;
  int64_t key_panel;    // one panel of a block along its keys
  int64_t keys_across;  // a block as the right factor of a product summed along the head
  int64_t keys_along;   // … summed along the keys
};

enum class Sight { none, some, all };

// Which of the keys of a block may be seen by queries a … b-1. O(tokens) memory, no mask.
class KeyBlocks {
 public:
  explicit KeyBlocks(const TreeProblem& p)
      : tokens_(p.tokens), ends_(static_cast<size_t>(round_up(p.tokens, kTreeKeys)), 0.0f) {
    std::copy(p.ends, p.ends + p.tokens, ends_.begin());  // behind the last key: seen by nobody
    for (int64_t from = 0; from < p.tokens; from += kTreeKeys) {
      const auto range =
          std::minmax_element(p.ends + from, p.ends + std::min(from + kTreeKeys, p.tokens));
      least_.push_back(*range.first);
      most_.push_back(*range.second);
    }
  }

  const float* ends(int64_t block) const { return ends_.data() + block * kTreeKeys; }

  Sight sight(int64_t block, int64_t a, int64_t b) const {
    const int64_t first = block * kTreeKeys, last = std::min(first + kTreeKeys, tokens_) - 1;
    if (first >= b || most_[static_cast<size_t>(block)] <= a) return Sight::none;
    const bool whole =
        last - first + 1 == kTreeKeys && last <= a && least_[static_cast<size_t>(block)] >= b;
    return whole ? Sight::all : Sight::some;
  }

  // The columns [low, high) of a block that are worth computing for queries a … b-1: low is a
  // multiple of 64, high of 16.
  void range(int64_t block, int64_t a, int64_t b, int64_t* low, int64_t* high) const {
    const float *e = ends(block), at = static_cast<float>(a);
    *high = std::min(kTreeKeys, round_up(b - block * kTreeKeys, 16));
    *low = 0;
    while (*low + 64 < *high &&
           std::all_of(e + *low, e + *low + 64, [&](float end) { return end <= at; }))
      *low += 64;
  }

 private:
  int64_t tokens_;
  std::vector<float> ends_;
  std::vector<int32_t> least_, most_;
};

}  // namespace appo

// See run.h.

#include "decoder/run.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "common/team.h"

namespace appo {
namespace {

// One linear over all rows, cut into units of `span` panels and kLayerRows rows. What a unit
// computes is handed to then(first panel, first row, rows, y, ld); units of the same panels follow
// each other, while these are in the cache.
template <typename Then>
void each_tile(const LayerKernels& k, const Packed& w, Rows x, int64_t rows, int64_t span,
               int64_t threads, const Then& then) {
  const Lowered low(k, w, x, rows);
  const int64_t groups = ceil_div(w.panels(), span), blocks = ceil_div(rows, kLayerRows);
  const int64_t ld = span * k.linear->panel, tile = std::min(rows, kLayerRows) * ld;
  threads = std::min(useful_threads(w, rows, threads), groups * blocks);
  // A head is taken in whole vectors, so the last one may be read up to a vector behind its end.
  const Scratch scratch((w.rank ? 2 : 1) * tile * threads + 16);
  run_team(groups * blocks, threads, [&](int64_t unit, int64_t part) {
    const int64_t p = unit / blocks * span, row = unit % blocks * kLayerRows;
    const int64_t some = std::min(kLayerRows, rows - row), count = std::min(span, w.panels() - p);
    float* y = scratch.get() + part * tile;
    linear(k, w, x, low, row, some, p, count, y, w.rank ? y + threads * tile : nullptr);
    then(p, row, some, y, count * k.linear->panel);
  });
}

// Normed rows as numbers; on one thread, for it takes a hundredth of the product that follows.
class Normed {
 public:
  Normed(const LayerKernels& k, int64_t rows, int64_t hidden)
      : stride_(round_up(hidden, 32) / k.linear->pair) {
    numbers_ = Scratch(rows * stride_);
  }
  Rows fill(const LayerKernels& k, const LayerShape& s, const float* x,
            const std::vector<float>& weight, int64_t rows) {
    const int64_t width = round_up(s.hidden, 32);
    for (int64_t i = 0; i < rows; ++i) {
      k.norm(x + i * s.hidden, weight.data(), s.hidden, s.eps, width, numbers_.get() + i * stride_);
    }
    return {numbers_.get(), stride_};
  }

 private:
  int64_t stride_;
  Scratch numbers_{0};
};

// x += the linear of `from`.
void add_linear(const LayerKernels& k, const Packed& w, Rows from, int64_t rows, float* x,
                int64_t threads) {
  each_tile(k, w, from, rows, 1, threads,
            [&](int64_t p, int64_t row, int64_t some, const float* y, int64_t ld) {
              for (int64_t i = 0; i < some; ++i)
                k.add(x + (row + i) * w.out + w.first(p), y + i * ld, w.count(p));
            });
}

}  // namespace

void layer_qkv(const LayerKernels& k, const LayerShape& s, const LayerWeights& w, int64_t rows,
               const float* x, const float* turn, const int64_t* positions, char* q, char* key,
               char* value, int64_t threads) {
  Normed normed(k, rows, s.hidden);
  const Rows from = normed.fill(k, s, x, w.norm1, rows);
  // A unit holds whole heads, so that they are finished while they are in the cache.
  const int64_t panel = k.linear->panel, dim = s.head_dim, span = std::lcm(dim, panel) / panel;
  const int64_t size = bytes_of(k.dtype) * dim, turned = s.heads + s.kv_heads;
  each_tile(k, w.qkv, from, rows, span, threads,
            [&](int64_t p, int64_t row, int64_t some, float* y, int64_t ld) {
              const int64_t first = p * panel / dim,
                            end = std::min(turned + s.kv_heads, (p + ld / panel) * panel / dim);
              for (int64_t i = row; i < row + some; ++i, y += ld) {
                const float* by = turn + positions[i] * dim;
                for (int64_t h = first; h < end; ++h) {
                  float* one = y + (h - first) * dim;
                  const float* weight = w.qk_norm.empty() ? nullptr : &w.qk_norm[h * dim];
                  if (h < s.heads) {
                    k.turn(one, dim, weight, s.eps, by, q + (i * s.heads + h) * size);
                  } else if (h < turned) {
                    k.turn(one, dim, weight, s.eps, by,
                           key + (i * s.kv_heads + h - s.heads) * size);
                  } else {
                    k.linear->emit(one, dim, k.dtype, value + (i * s.kv_heads + h - turned) * size);
                  }
                }
              }
            });
}

void layer_mlp(const LayerKernels& k, const LayerShape& s, const LayerWeights& w, int64_t rows,
               const char* attended, float* x, int64_t threads) {
  const int64_t pair = k.linear->pair, panel = k.linear->panel;
  add_linear(k, w.o, {reinterpret_cast<const float*>(attended), w.o.in / pair}, rows, x, threads);

  Normed normed(k, rows, s.hidden);
  const Rows from = normed.fill(k, s, x, w.norm2, rows);
  const int64_t stride = round_up(s.ff, 32) / pair;
  const Scratch middle(rows * stride);
  each_tile(k, w.gate_up, from, rows, 2, threads,
            [&](int64_t p, int64_t row, int64_t some, float* y, int64_t ld) {
              char* to = reinterpret_cast<char*>(middle.get() + row * stride) +
                         w.gate_up.first(p) * bytes_of(k.dtype);
              for (int64_t i = 0; i < some; ++i, y += ld, to += stride * 4)
                k.gate(y, y + panel, w.gate_up.count(p), to);
            });
  add_linear(k, w.down, {middle.get(), stride}, rows, x, threads);
}

}  // namespace appo

// Attention over segments: units of work (a tile of rows x a head of keys), blocks of keys, products. See attention.h.

#include "attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "linear_problem.h"

namespace appo {
namespace {

// Sizes of one tile. The head dimension is fetched in widths of 32 numbers and summed in whole vectors of 16.
struct Shape {
  explicit Shape(const AttentionProblem& p)
      : pair(p.products->pair),
        panel(p.products->panel),
        width(round_up(p.dim, 32)),
        sum(round_up(p.dim, 16)),
        group(p.heads / p.kv_heads),
        rows(std::max<int64_t>(1, p.tile_rows / group)),
        dim_panels(ceil_div(p.dim, panel)) {}

  int64_t pair, panel, width, sum, group, rows, dim_panels;
  int64_t words() const { return width / pair; }      // of one query or key
  int64_t key_words() const { return kKeys / pair; }  // of one block along the keys
  int64_t queries() const { return rows * group; }
};

// A tile's scratch memory, in whole cache lines each.
class Tile {
 public:
  explicit Tile(const Shape& s) {
    const std::pair<float**, int64_t> parts[] = {
        {&q, s.queries() * s.words()},
        {&keys, round_up(kKeys, s.panel) * s.words()},
        {&values, s.key_words() * s.dim_panels * s.panel},
        {&last, s.dim_panels * s.panel},
        {&scores, s.queries() * kKeys},
        {&weights, s.queries() * s.key_words()},
        {&sums, s.queries() * s.sum},
        {&state, s.queries() * 2},
        {&stage, 16 * s.width},
        {&fetched, 2 * s.width},
    };
    int64_t floats = 0;
    for (const auto& part : parts) floats += round_up(part.second, 16);
    memory_ = Scratch(floats);
    float* at = memory_.get();
    for (const auto& part : parts) {
      *part.first = at;
      at += round_up(part.second, 16);
    }
  }

  float *q, *keys, *values, *last;  // queries, packed keys and values, the last word row of an odd count
  float *scores, *weights, *sums;   // [queries][kKeys], [queries][words along the keys], [queries][sum]
  float* state;                     // [queries] (m, l)
  float *stage, *fetched;           // rows on their way into panels

 private:
  Scratch memory_{0};
};

// Asks for the next block's memory bit by bit while this one is worked on: rows are short and heads far apart, so the
// processor alone does not run far enough ahead.
class Ahead {
 public:
  Ahead(const Matrix& keys, const Matrix& values, int64_t count, int64_t calls)
      : keys_(keys), values_(values), count_(count), share_(ceil_div(count, calls)) {}
  void operator()() {
    const int64_t bytes = keys_.columns * bytes_of(keys_.dtype);
    for (int64_t end = std::min(row_ + share_, count_); row_ < end; ++row_) {
      for (int64_t at = 0; at < bytes; at += 64) {
        __builtin_prefetch(row_of(keys_, row_) + at, 0, 2);
        __builtin_prefetch(row_of(values_, row_) + at, 0, 2);
      }
    }
  }

 private:
  Matrix keys_, values_;
  int64_t count_, share_, row_ = 0;
};

Matrix side(const AttentionProblem& p, const Segment& s, int64_t head, int64_t first, bool values) {
  const int64_t at = p.layer * s.layer_stride + head * s.head_stride + first * s.token_stride + (values ? s.values : 0);
  return {s.data + at * bytes_of(p.dtype), p.dtype, p.dim, s.token_stride, 1, nullptr};
}

// Panels [words along the head][panel of keys] of `count` keys; what is behind them is zero up to a whole panel.
void pack_keys(const AttentionProblem& p, const Shape& s, const Matrix& keys, int64_t count, const Tile& t) {
  for (int64_t j = 0; j < count; j += s.panel) {
    p.products->pack_across(keys, j, std::min(s.panel, count - j), s.width, t.stage, t.keys + j * s.words());
  }
}

// Panels [words along the keys][panel of the head]; a key that completes the last word counts as zero.
void pack_values(const AttentionProblem& p, const Shape& s, const Matrix& values, int64_t count, const Tile& t) {
  const bool as_it_is = s.sum == p.dim && (s.pair == 2 || p.dtype == Dtype::f32);
  const int64_t stride = s.key_words() * s.panel;
  for (int64_t j = 0; j < count; j += s.pair) {
    const void* rows[2] = {nullptr, nullptr};
    for (int64_t i = 0; i < s.pair; ++i) {
      float* to = t.fetched + i * s.width;
      if (j + i >= count) {
        std::memset(to, 0, static_cast<size_t>(s.width) * 4);
      } else if (!as_it_is) {
        p.products->fetch(values, j + i, s.width, to);
      }
      rows[i] = as_it_is && j + i < count ? static_cast<const void*>(row_of(values, j + i)) : to;
    }
    p.products->pack_along(rows[0], rows[1], s.sum, t.values + j / s.pair * s.panel, stride);
  }
}

// sums += weights · values for query rows first … first+queries-1, which see n keys of the block. The odd last key of a
// word product stands alone, so that what lies behind it (another row's key, perhaps not a number) is never multiplied.
void add_values(const AttentionProblem& p, const Shape& s, int64_t first, int64_t queries, int64_t n, const Tile& t) {
  const int64_t row = s.key_words(), stride = row * s.panel, whole = n / s.pair;
  const float* weights = t.weights + first * row;
  float* sums = t.sums + first * s.sum;
  if (whole > 0) {
    p.products->product(queries, s.sum, whole, weights, row, 1, t.values, stride, sums, s.sum, true);
  }
  if (n % s.pair == 0) return;
  for (int64_t j = 0; j < s.dim_panels; ++j) {
    const float* from = t.values + j * stride + whole * s.panel;
    for (int64_t i = 0; i < s.panel; ++i) {
      uint32_t word;
      std::memcpy(&word, from + i, 4);
      word &= 0xffffu;
      std::memcpy(t.last + j * s.panel + i, &word, 4);
    }
  }
  p.products->product(queries, s.sum, 1, weights + whole, row, 1, t.last, s.panel, sums, s.sum, true);
}

// Rows of the tile that start at `row` and see equally many (`same`), or any, keys of the block.
template <typename Seen>
int64_t run_of(int64_t row, int64_t end, bool same, Seen&& seen) {
  const int64_t n = seen(row);
  int64_t last = row + 1;
  while (last < end && (same ? seen(last) == n : (seen(last) > 0) == (n > 0))) ++last;
  return last;
}

// Rows a … b-1 (counted in the tile) meet a block of `count` keys; `seen` says how many of them a row may see.
template <typename Seen>
void meet(const AttentionProblem& p, const Shape& s, int64_t a, int64_t b, const Matrix& keys, const Matrix& values,
          int64_t count, float scale2, const Tile& t, Ahead& ahead, Seen&& seen) {
  pack_keys(p, s, keys, count, t);
  pack_values(p, s, values, count, t);
  const int64_t words = ceil_div(p.dim, s.pair);
  for (int64_t first = a, last; first < b; first = last) {
    last = run_of(first, b, false, seen);
    if (seen(first) == 0) continue;
    int64_t most = 0;
    for (int64_t i = first; i < last; ++i) most = std::max(most, seen(i));
    float* scores = t.scores + first * s.group * kKeys;
    p.products->product((last - first) * s.group, most, words, t.q + first * s.group * s.words(), s.words(), 1, t.keys,
                        s.words() * s.panel, scores, kKeys, false);
    for (int64_t row = first, next; row < last; row = next) {
      next = run_of(row, last, true, seen);
      for (int64_t i = row * s.group; i < next * s.group; ++i) {
        p.rows_of->absorb(t.scores + i * kKeys, seen(row), scale2, t.state + 2 * i, t.sums + i * s.sum, s.sum,
                          t.weights + i * s.key_words());
        ahead();
      }
      add_values(p, s, row * s.group, (next - row) * s.group, seen(row), t);
    }
  }
}

void attend_tile(const AttentionProblem& p, const Shape& s, int64_t a, int64_t b, int64_t head, float scale2,
                 const Tile& t) {
  const Matrix q{p.q + head * s.group * p.dim * bytes_of(p.dtype), p.dtype, p.dim, p.dim, 1, nullptr};
  for (int64_t i = a; i < b; ++i) {
    Matrix row = q;
    row.data += i * p.q_stride * bytes_of(p.dtype);
    for (int64_t g = 0; g < s.group; ++g) {
      p.products->fetch(row, g, s.width, t.q + ((i - a) * s.group + g) * s.words());
    }
  }
  const int64_t queries = (b - a) * s.group;
  std::fill(t.sums, t.sums + queries * s.sum, 0.0f);
  for (int64_t i = 0; i < queries; ++i) {
    t.state[2 * i] = kEmpty;
    t.state[2 * i + 1] = 0.0f;
  }
  for (int64_t e = 0; e < p.read_count; ++e) {
    const Read& r = p.reads[e];
    const int64_t first = std::max(a, r.a), last = std::min(b, r.b);
    if (first >= last) continue;
    const int64_t* limits = p.limits + r.limits - r.a;
    const int64_t most = *std::max_element(limits + first, limits + last);
    for (int64_t from = 0; from < most; from += kKeys) {
      const Segment& segment = p.segments[r.segment];
      const int64_t count = std::min(kKeys, most - from), next = from + count;
      Ahead ahead(side(p, segment, head, next, false), side(p, segment, head, next, true), std::min(kKeys, most - next),
                  (last - first) * s.group);
      meet(p, s, first - a, last - a, side(p, segment, head, from, false), side(p, segment, head, from, true), count,
           scale2, t, ahead, [&](int64_t i) { return std::clamp<int64_t>(limits[a + i] - from, 0, count); });
    }
  }
  for (int64_t i = 0; i < queries; ++i) {
    float *sum = t.sums + i * s.sum, total = t.state[2 * i + 1];
    if (total == 0.0f) total = 1.0f;  // a row without keys: zeros
    for (int64_t d = 0; d < p.dim; ++d) sum[d] /= total;
    const int64_t at = ((a + i / s.group) * p.heads + head * s.group + i % s.group) * p.dim;
    p.products->emit(sum, p.dim, p.dtype, p.out + at * bytes_of(p.dtype));
  }
}

void write(const AttentionProblem& p) {
  const int64_t size = bytes_of(p.dtype);
  for (int64_t i = 0; i < p.write_count; ++i) {
    const Write& w = p.writes[i];
    const Segment& s = p.segments[w.segment];
    for (int64_t head = 0; head < p.kv_heads; ++head) {
      const auto put = [&](bool values, const char* from, int64_t stride) {
        char* to = const_cast<char*>(side(p, s, head, w.position, values).data);
        std::memcpy(to, from + (w.row * stride + head * p.dim) * size, static_cast<size_t>(p.dim * size));
      };
      put(false, p.k, p.k_stride);
      put(true, p.v, p.v_stride);
    }
  }
}

}  // namespace

void attention(const AttentionProblem& p) {
  const Shape s(p);
  const float scale2 = kLog2e / std::sqrt(static_cast<float>(p.dim));
  write(p);
  int64_t tiles = ceil_div(p.rows, s.rows);
  if (tiles * p.kv_heads < 4 * p.threads && tiles * p.kv_heads % p.threads != 0) {
    tiles = std::min(p.rows, tiles * p.threads);  // few units: as many for every thread
  }
  const int64_t units = tiles * p.kv_heads, threads = std::min(units, p.threads);
  std::vector<std::unique_ptr<Tile>> scratch(static_cast<size_t>(threads));
  run_units(units, threads, [&](int64_t unit, int64_t part) {
    auto& mine = scratch[static_cast<size_t>(part)];
    if (!mine) mine = std::make_unique<Tile>(s);
    // Tiles of nearly equal size; all heads of a tile one after another.
    const int64_t tile = unit / p.kv_heads, a = p.rows * tile / tiles, b = p.rows * (tile + 1) / tiles;
    attend_tile(p, s, a, b, unit % p.kv_heads, scale2, *mine);
  });
}

}  // namespace appo

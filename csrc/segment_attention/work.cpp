// Attention over segments: units of work (a tile of rows x heads of keys), chunks of keys, strips
// of query rows. See segment_attention.h.

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include "common/scratch.h"
#include "common/team.h"
#include "segment_attention/segment_attention.h"

namespace appo {
namespace {

// Sizes of one tile: `rows` rows, and a unit's heads of keys. Queries are fetched in widths of 32
// numbers, values summed in whole vectors of 16.
struct Sizes {
  Sizes(const AttentionProblem& p, int64_t unit_heads)
      : heads(unit_heads),
        group(p.shape.heads / p.shape.kv_heads),
        rows(std::max<int64_t>(1, p.tile_rows / group)),
        width(round_up(p.shape.dim, 32)),
        words(width / p.kernels->linear->pair),
        sum(round_up(p.shape.dim, 16)) {}

  int64_t heads, group, rows, width, words, sum;
  int64_t queries() const { return heads * rows * group; }
};

// A tile's scratch memory, in whole cache lines each.
class Tile {
 public:
  explicit Tile(const Sizes& s) {
    const std::pair<float**, int64_t> parts[] = {
        {&q, s.queries() * s.words}, {&sums, s.queries() * s.sum}, {&state, s.queries() * 2},
        {&scores, kStrip * kChunk},  {&weights, kStrip * kChunk},
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

  float *q, *sums, *state;  // [queries] [words], [sum], [2]
  float *scores, *weights;  // of a strip

 private:
  Scratch memory_{0};
};

// Rows a … b-1 meet positions from … from+count-1 of a segment; limits[i - a] says how much of it
// each reads.
struct Chunk {
  int64_t a, b;
  const int64_t* limits;
  int64_t from, count;
};

// A tile's rows a … b-1 and heads of keys from `head` on. Its queries are numbered head by head,
// row by row.
class Unit {
 public:
  Unit(const AttentionProblem& p, const Sizes& sizes, const Tile& tile, int64_t a, int64_t b,
       int64_t head)
      : p_(p), sizes_(sizes), tile_(tile), a_(a), b_(b), head_(head), each_((b - a) * sizes.group) {
    scale2_ = kLog2e / std::sqrt(static_cast<float>(p.shape.dim));
  }

  void run() {
    fetch();
    find();
    const float* const* blocks = blocks_.data();
    for (const Chunk& chunk : chunks_) {
      for (int64_t head = 0; head < sizes_.heads; ++head) meet(chunk, head, blocks);
      blocks += ceil_div(chunk.count, kBlock);
    }
    emit();
  }

 private:
  int64_t queries() const { return sizes_.heads * each_; }

  // Where query i begins, in elements, if rows are `stride` apart.
  int64_t place(int64_t i, int64_t stride) const {
    const int64_t row = a_ + i % each_ / sizes_.group, head = head_ + i / each_;
    return row * stride + (head * sizes_.group + i % sizes_.group) * p_.shape.dim;
  }

  void fetch() {
    const int64_t dim = p_.shape.dim;
    for (int64_t i = 0; i < queries(); ++i) {
      const char* from = p_.q + place(i, p_.q_stride) * bytes_of(p_.shape.dtype);
      const Matrix q{from, p_.shape.dtype, dim, dim, 1, nullptr};
      p_.kernels->linear->fetch(q, 0, sizes_.width, tile_.q + i * sizes_.words);
      tile_.state[2 * i] = -std::numeric_limits<float>::infinity();  // until it meets a key
      tile_.state[2 * i + 1] = 0.0f;
    }
    std::fill(tile_.sums, tile_.sums + queries() * sizes_.sum, 0.0f);
  }

  // The chunks that the tile's rows read, in order, and where their blocks lie: all of them, and
  // then the last again for as far as is looked ahead.
  void find() {
    for (int64_t i = 0; i < p_.read_count; ++i) {
      const Read& r = p_.reads[i];
      const int64_t first = std::max(a_, r.a), last = std::min(b_, r.b);
      if (first >= last) continue;
      const int64_t* limits = p_.limits + r.limits + (first - r.a);
      const int64_t most = *std::max_element(limits, limits + (last - first));
      const int64_t* blocks = p_.blocks + p_.segments[r.segment].first;
      for (int64_t from = 0; from < most; from += kChunk) {
        chunks_.push_back({first, last, limits, from, std::min(kChunk, most - from)});
      }
      for (int64_t j = 0; j < ceil_div(most, kBlock); ++j) {
        blocks_.push_back(reinterpret_cast<const float*>(p_.block_of(blocks[j])));
      }
    }
    if (!blocks_.empty()) blocks_.insert(blocks_.end(), kAhead, blocks_.back());
  }

  // Rows meet a head of a chunk: every run of rows that read something of it in strips of nearly
  // equal height.
  void meet(const Chunk& chunk, int64_t head, const float* const* blocks) {
    const int64_t head_floats = p_.head_bytes() / 4;
    const auto seen = [&](int64_t row) {
      return std::clamp<int64_t>(chunk.limits[row - chunk.a] - chunk.from, 0, chunk.count);
    };
    const float* const* ahead = blocks + kAhead;
    for (int64_t row = chunk.a, end; row < chunk.b; row = end) {
      end = row + 1;
      if (seen(row) == 0) continue;
      while (end < chunk.b && seen(end) > 0) ++end;
      const int64_t all = (end - row) * sizes_.group, strips = ceil_div(all, kStrip);
      for (int64_t i = 0; i < strips; ++i) {
        const int64_t a = all * i / strips, b = all * (i + 1) / strips;
        const int64_t query = head * each_ + (row - a_) * sizes_.group + a;
        Strip s{};
        s.rows = b - a;
        s.dim = p_.shape.dim;
        s.scale2 = scale2_;
        s.q = tile_.q + query * sizes_.words;
        s.q_stride = sizes_.words;
        s.blocks = blocks;
        s.ahead = ahead;
        s.keys = (head_ + head) * head_floats;
        s.values = s.keys + p_.shape.kv_heads * head_floats;
        for (int64_t j = a; j < b; ++j) s.seen[j - a] = seen(row + j / sizes_.group);
        s.scores = tile_.scores;
        s.weights = tile_.weights;
        s.state = tile_.state + 2 * query;
        s.sums = tile_.sums + query * sizes_.sum;
        s.sum_stride = sizes_.sum;
        p_.kernels->meet(s);
        ahead = blocks;  // asked for once
      }
    }
  }

  void emit() {
    for (int64_t i = 0; i < queries(); ++i) {
      float *sum = tile_.sums + i * sizes_.sum, total = tile_.state[2 * i + 1];
      if (std::isinf(tile_.state[2 * i])) total = 1.0f;  // a row without keys: zeros
      for (int64_t d = 0; d < p_.shape.dim; ++d) sum[d] /= total;
      char* to = p_.out + place(i, p_.out_stride) * bytes_of(p_.shape.dtype);
      p_.kernels->linear->emit(sum, p_.shape.dim, p_.shape.dtype, to);
    }
  }

  const AttentionProblem& p_;
  const Sizes& sizes_;
  const Tile& tile_;
  int64_t a_, b_, head_, each_;  // each_: queries of a head
  float scale2_;
  std::vector<Chunk> chunks_;
  std::vector<const float*> blocks_;
};

}  // namespace

void attention(const AttentionProblem& p) {
  if (p.shape.rows == 0) return;
  write_slots(p);
  const int64_t rows = p.shape.rows, kv_heads = p.shape.kv_heads;
  int64_t tiles = ceil_div(rows, Sizes(p, 1).rows), heads = kv_heads;
  // All heads of a block lie side by side, and are best read so. Few tiles are cut by heads for
  // several threads, and into as many for every thread.
  if (p.threads > 1 && tiles < 4 * p.threads) heads = 1;
  if (heads < kv_heads && tiles * kv_heads < 4 * p.threads && tiles * kv_heads % p.threads != 0) {
    tiles = std::min(rows, tiles * p.threads);
  }
  const Sizes sizes(p, heads);
  const int64_t parts = kv_heads / heads, units = tiles * parts,
                threads = std::min(units, p.threads);
  std::vector<std::unique_ptr<Tile>> scratch(static_cast<size_t>(threads));
  run_team(units, threads, [&](int64_t unit, int64_t part) {
    auto& mine = scratch[static_cast<size_t>(part)];
    if (!mine) mine = std::make_unique<Tile>(sizes);
    // Tiles of nearly equal size, those with the longest past first.
    const int64_t tile = tiles - 1 - unit / parts, a = rows * tile / tiles,
                  b = rows * (tile + 1) / tiles;
    Unit(p, sizes, *mine, a, b, unit % parts * heads).run();
  });
}

}  // namespace appo

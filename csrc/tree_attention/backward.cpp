// Tree attention, backward: the weights are computed again from lse, five products per pair of a
// block and a tile.
//
//   p = 2^(q kᵀ scale2 - lse2)   ds = p (g vᵀ - delta)   delta = Σ g o - d_lse
//   dv = pᵀ g   dk = scale dsᵀ q   dq = scale ds k
//
// One head of keys after the other, so that scratch memory holds the packed forms of one group of
// query heads. A unit of work is a block of keys: its dk and dv belong to one thread. dq belongs to
// a tile and takes the contributions of its blocks in their order, each block waiting for its turn:
// the same bits with any number of threads, and no second copy.

#include <algorithm>
#include <cmath>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <utility>
#include <vector>

#include "tree_attention/pack.h"

namespace appo {
namespace {

// Whose turn it is at each tile. Blocks are started in order, so those that one waits for are
// already at work.
class Turns {
 public:
  void reset(std::vector<int64_t> first) { next_ = std::move(first); }
  void wait(int64_t tile, int64_t block) {
    std::unique_lock<std::mutex> lock(mutex_);
    turn_.wait(lock, [&] { return next_[static_cast<size_t>(tile)] == block; });
  }
  void pass(int64_t tile, int64_t block) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      next_[static_cast<size_t>(tile)] = block;
    }
    turn_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable turn_;
  std::vector<int64_t> next_;
};

class Backward {
 public:
  Backward(const TreeProblem& p, const TreeGrads& g)
      : p_(p),
        g_(g),
        s_(p),
        blocks_(p),
        tile_rows_(s_.rows * s_.row),
        tile_panel_(s_.rows / s_.pair * s_.panel),
        tile_along_(s_.dim_panels * tile_panel_),
        q_rows_(s_.tiles * tile_rows_),
        q_along_(s_.tiles * tile_along_),
        g_rows_(s_.tiles * tile_rows_),
        g_along_(s_.tiles * tile_along_),
        dq_(s_.tiles * s_.rows * s_.sum),
        lse2_(static_cast<size_t>(s_.tiles * s_.rows)),
        delta_(static_cast<size_t>(s_.tiles * s_.rows)) {
    for (int64_t i = 0; i < p.threads; ++i) own_.emplace_back(p_, s_);
  }

  void run() {
    std::vector<int64_t> first(static_cast<size_t>(s_.tiles));
    for (int64_t t = 0; t < s_.tiles; ++t) first[static_cast<size_t>(t)] = next_seen(t, 0);
    for (head_ = 0; head_ < p_.kv_heads; ++head_) {
      turns_.reset(first);
      run_units(s_.tiles, p_.threads, [&](int64_t tile, int64_t part) { pack(tile, own(part)); });
      run_units(s_.blocks, p_.threads,
                [&](int64_t block, int64_t part) { meet_all(block, own(part)); });
    }
  }

 private:
  struct Own {  // of one thread
    Own(const TreeProblem& p, const TreeSizes& s)
        : rows(std::max(kTreeKeys, s.rows) * s.row),
          stage(p.products->lanes * s.row),
          k_across(s.keys_across),
          k_along(s.keys_along),
          v_across(s.keys_across),
          p(s.rows * kTreeKeys),
          ds(s.rows * kTreeKeys),
          p_pairs(s.pair == 2 ? s.rows / 2 * kTreeKeys : 0),
          ds_pairs(s.pair == 2 ? s.rows / 2 * kTreeKeys : 0),
          ds_rows(s.pair == 2 ? s.rows / 2 * kTreeKeys : 0),
          dk(kTreeKeys * s.sum),
          dv(kTreeKeys * s.sum),
          hurt(static_cast<size_t>(std::max(kTreeKeys, s.rows))) {}
    Scratch rows, stage, k_across, k_along, v_across;
    Scratch p, ds, p_pairs, ds_pairs,
        ds_rows;  // weights and their gradients: floats, words along rows, rows
    Scratch dk, dv;
    std::vector<float> hurt;
    alignas(64) float seen[kTreeKeys], unused[kTreeKeys];
  };

  Own& own(int64_t part) { return own_[static_cast<size_t>(part)]; }
  int64_t first_of(int64_t tile) const { return tile * s_.queries; }
  int64_t end_of(int64_t tile) const { return std::min(first_of(tile) + s_.queries, p_.tokens); }

  // The first block from `block` on of which the tile sees anything.
  int64_t next_seen(int64_t tile, int64_t block) const {
    while (block < s_.blocks && blocks_.sight(block, first_of(tile), end_of(tile)) == Sight::none)
      ++block;
    return block;
  }

  // Queries and upstream gradients of a tile. A row of either that is not finite gets lse NaN: so
  // do all its gradients.
  void pack(int64_t tile, Own& mine) {
    const int64_t a = first_of(tile), count = end_of(tile) - a, rows = count * s_.group,
                  head = head_ * s_.group;
    float *q = q_rows_.get() + tile * tile_rows_, *g = g_rows_.get() + tile * tile_rows_;
    std::fill(mine.hurt.begin(), mine.hurt.end(), 0.0f);
    fetch_rows(p_, s_, p_.q, a, count, head, s_.group, q, mine.hurt.data());
    fetch_rows(p_, s_, g_.g, a, count, head, s_.group, g, mine.hurt.data());
    rows_along(p_, s_, q, rows, tile_panel_, q_along_.get() + tile * tile_along_);
    rows_along(p_, s_, g, rows, tile_panel_, g_along_.get() + tile * tile_along_);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t token = a + i / s_.group, h = head + i % s_.group, at = token * p_.heads + h;
      const auto row = static_cast<size_t>(tile * s_.rows + i);
      lse2_[row] = g_.lse[at] * kLog2e + mine.hurt[static_cast<size_t>(i)];
      delta_[row] = p_.rows->dot(head_row(p_, g_.g, token, h), head_row(p_, g_.o, token, h),
                                 p_.dtype, p_.dim) -
                    (g_.d_lse ? g_.d_lse[at] : 0.0f);
    }
    std::fill_n(dq_.get() + tile * s_.rows * s_.sum, s_.rows * s_.sum, 0.0f);
  }

  // Rows of keys or values that are not finite become zeros; whoever saw one has lse NaN already.
  void pack_keys(int64_t first, int64_t count, Own& mine) {
    float* rows = mine.rows.get();
    fetch_rows(p_, s_, p_.v, first, count, head_, 1, rows, mine.hurt.data());
    rows_across(p_, s_, rows, count, mine.stage.get(), mine.v_across.get());
    fetch_rows(p_, s_, p_.k, first, count, head_, 1, rows, mine.hurt.data());
    rows_across(p_, s_, rows, count, mine.stage.get(), mine.k_across.get());
    if (count < kTreeKeys)
      std::fill_n(mine.k_along.get(), s_.keys_along, 0.0f);  // met with ds 0: must be numbers
    rows_along(p_, s_, rows, count, s_.key_panel, mine.k_along.get());
  }

  void meet_all(int64_t block, Own& mine) {
    const int64_t first = block * kTreeKeys, count = std::min(kTreeKeys, p_.tokens - first);
    pack_keys(first, count, mine);
    std::fill_n(mine.dk.get(), kTreeKeys * s_.sum, 0.0f);
    std::fill_n(mine.dv.get(), kTreeKeys * s_.sum, 0.0f);
    for (int64_t tile = first / s_.queries; tile < s_.tiles; ++tile) {
      const Sight sight = blocks_.sight(block, first_of(tile), end_of(tile));
      if (sight != Sight::none) meet(block, tile, sight, mine);
    }
    for (int64_t j = 0; j < count; ++j) {
      const int64_t at = ((first + j) * p_.kv_heads + head_) * p_.dim * bytes_of(p_.dtype);
      emit(mine.dk.get() + j * s_.sum, p_.scale, g_.dk + at);
      emit(mine.dv.get() + j * s_.sum, 1.0f, g_.dv + at);
    }
  }

  void meet(int64_t block, int64_t tile, Sight sight, Own& mine) {
    const int64_t a = first_of(tile), b = end_of(tile), rows = (b - a) * s_.group;
    int64_t low, high;
    blocks_.range(block, a, b, &low, &high);
    const int64_t n = high - low, across = low * s_.row, along = low / s_.pair * s_.panel;
    const MatrixKernels& k = *p_.products;
    float *p = mine.p.get() + low, *ds = mine.ds.get() + low;
    k.product(rows, n, s_.words, q_rows_.get() + tile * tile_rows_, s_.row, 1,
              mine.k_across.get() + across, s_.row * s_.panel, p, kTreeKeys, false);
    k.product(rows, n, s_.words, g_rows_.get() + tile * tile_rows_, s_.row, 1,
              mine.v_across.get() + across, s_.row * s_.panel, ds, kTreeKeys, false);
    for (int64_t i = 0; i < rows; ++i) {
      if (sight == Sight::some && i % s_.group == 0) {
        p_.rows->see(blocks_.ends(block) + low, kNoHurt, block * kTreeKeys + low, n,
                     a + i / s_.group, mine.seen);
      }
      const auto row = static_cast<size_t>(tile * s_.rows + i);
      p_.rows->slope(p + i * kTreeKeys, ds + i * kTreeKeys,
                     sight == Sight::some ? mine.seen : nullptr, n, scale2_, lse2_[row],
                     delta_[row]);
    }
    const int64_t row_words = ceil_div(rows, s_.pair), ds_row = kTreeKeys / s_.pair;
    if (s_.pair == 2) round(rows, low, n, mine);
    const float* p_left = s_.pair == 2 ? mine.p_pairs.get() : mine.p.get();
    const float* ds_left = s_.pair == 2 ? mine.ds_pairs.get() : mine.ds.get();
    const float* ds_rows = s_.pair == 2 ? mine.ds_rows.get() : mine.ds.get();
    k.product(n, s_.sum, row_words, p_left + low, 1, kTreeKeys, g_along_.get() + tile * tile_along_,
              tile_panel_, mine.dv.get() + low * s_.sum, s_.sum, true);
    k.product(n, s_.sum, row_words, ds_left + low, 1, kTreeKeys,
              q_along_.get() + tile * tile_along_, tile_panel_, mine.dk.get() + low * s_.sum,
              s_.sum, true);
    turns_.wait(tile, block);
    float* dq = dq_.get() + tile * s_.rows * s_.sum;
    k.product(rows, s_.sum, n / s_.pair, ds_rows + low / s_.pair, ds_row, 1,
              mine.k_along.get() + along, s_.key_panel, dq, s_.sum, true);
    const int64_t next = next_seen(tile, block + 1);
    if (next == s_.blocks) {
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t at = (a + i / s_.group) * p_.heads + head_ * s_.group + i % s_.group;
        emit(dq + i * s_.sum, p_.scale, g_.dq + at * p_.dim * bytes_of(p_.dtype));
      }
    }
    turns_.pass(tile, next);
  }

  // p and ds to bf16: words along the rows for dk and dv, rows for dq. An odd last row is paired
  // with zeros.
  void round(int64_t rows, int64_t low, int64_t n, Own& mine) {
    float *p = mine.p.get() + low, *ds = mine.ds.get() + low;
    if (rows % 2) {
      std::fill_n(p + rows * kTreeKeys, n, 0.0f);
      std::fill_n(ds + rows * kTreeKeys, n, 0.0f);
    }
    for (int64_t i = 0; i < rows; i += 2) {
      const int64_t at = i * kTreeKeys, pair = i / 2 * kTreeKeys + low,
                    row = (i * kTreeKeys + low) / 2;
      float* to = mine.ds_rows.get() + row;
      p_.products->store(p + at, p + at + kTreeKeys, n, mine.unused, mine.unused + kTreeKeys / 2,
                         mine.p_pairs.get() + pair);
      p_.products->store(ds + at, ds + at + kTreeKeys, n, to, to + kTreeKeys / 2,
                         mine.ds_pairs.get() + pair);
    }
  }

  void emit(float* row, float factor, char* to) const {
    for (int64_t d = 0; d < s_.sum; ++d) row[d] *= factor;
    p_.products->emit(row, p_.dim, p_.dtype, to);
  }

  static constexpr float kNoHurt[kTreeKeys] = {};

  const TreeProblem& p_;
  const TreeGrads& g_;
  const TreeSizes s_;
  const KeyBlocks blocks_;
  const int64_t tile_rows_, tile_panel_, tile_along_;  // words per tile
  const float scale2_ = p_.scale * kLog2e;
  Scratch q_rows_, q_along_, g_rows_, g_along_, dq_;
  std::vector<float> lse2_, delta_;
  std::vector<Own> own_;
  Turns turns_;
  int64_t head_ = 0;
};

}  // namespace

void tree_backward(const TreeProblem& p, const TreeGrads& g) { Backward(p, g).run(); }

}  // namespace appo

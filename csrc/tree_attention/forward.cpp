// Tree attention, forward. All keys and values are packed once (as much memory as they take), then
// tiles of queries meet the blocks that they see, the longest tiles first.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "tree_attention/pack.h"

namespace appo {
namespace {

class Forward {
 public:
  Forward(const TreeProblem& p, char* out, float* lse)
      : p_(p),
        out_(out),
        lse_(lse),
        s_(p),
        blocks_(p),
        keys_(p.kv_heads * s_.blocks * s_.keys_across),
        values_(p.kv_heads * s_.blocks * s_.keys_along),
        hurt_(static_cast<size_t>(p.kv_heads * s_.blocks * kTreeKeys), 0.0f),
        any_hurt_(static_cast<size_t>(p.kv_heads * s_.blocks), 0) {
    for (int64_t i = 0; i < p.threads; ++i) own_.emplace_back(p_, s_);
  }

  void run() {
    run_units(p_.kv_heads * s_.blocks, p_.threads,
              [&](int64_t unit, int64_t part) { pack(unit, own(part)); });
    run_units(p_.kv_heads * s_.tiles, p_.threads, [&](int64_t unit, int64_t part) {
      tile(s_.tiles - 1 - unit / p_.kv_heads, unit % p_.kv_heads, own(part));
    });
  }

 private:
  struct Own {  // of one thread
    Own(const TreeProblem& p, const TreeSizes& s)
        : rows(std::max(kTreeKeys, s.rows) * s.row),
          stage(p.products->lanes * s.row),
          scores(s.rows * kTreeKeys),
          weights(s.rows * kTreeKeys / s.pair),
          sums(s.rows * s.sum),
          state(static_cast<size_t>(s.rows * 2)),
          hurt(static_cast<size_t>(s.rows)) {}
    Scratch rows, stage, scores, weights, sums;
    std::vector<float> state, hurt;
    alignas(64) float seen[kTreeKeys];
  };

  Own& own(int64_t part) { return own_[static_cast<size_t>(part)]; }

  void pack(int64_t unit, Own& mine) {
    const int64_t head = unit / s_.blocks, first = unit % s_.blocks * kTreeKeys;
    const int64_t count = std::min(kTreeKeys, p_.tokens - first);
    float *hurt = hurt_.data() + unit * kTreeKeys, *values = values_.get() + unit * s_.keys_along;
    fetch_rows(p_, s_, p_.k, first, count, head, 1, mine.rows.get(), hurt);
    rows_across(p_, s_, mine.rows.get(), count, mine.stage.get(),
                keys_.get() + unit * s_.keys_across);
    fetch_rows(p_, s_, p_.v, first, count, head, 1, mine.rows.get(), hurt);
    if (count < kTreeKeys)
      std::fill_n(values, s_.keys_along, 0.0f);  // met with weight 0: must be numbers
    rows_along(p_, s_, mine.rows.get(), count, s_.key_panel, values);
    any_hurt_[static_cast<size_t>(unit)] =
        std::any_of(hurt, hurt + count, [](float x) { return std::isnan(x); });
  }

  void tile(int64_t index, int64_t head, Own& mine) {
    const int64_t a = index * s_.queries, b = std::min(a + s_.queries, p_.tokens),
                  rows = (b - a) * s_.group;
    std::fill(mine.hurt.begin(), mine.hurt.end(), 0.0f);
    fetch_rows(p_, s_, p_.q, a, b - a, head * s_.group, s_.group, mine.rows.get(),
               mine.hurt.data());
    std::fill_n(mine.sums.get(), rows * s_.sum, 0.0f);
    for (int64_t i = 0; i < rows; ++i) {
      mine.state[static_cast<size_t>(2 * i)] = kEmpty;
      mine.state[static_cast<size_t>(2 * i + 1)] = 0.0f;
    }
    for (int64_t block = 0; block < s_.blocks && block * kTreeKeys < b; ++block) {
      const Sight sight = blocks_.sight(block, a, b);
      if (sight != Sight::none) meet(block, sight, a, b, head, mine);
    }
    for (int64_t i = 0; i < rows; ++i)
      finish(a + i / s_.group, head * s_.group + i % s_.group, i, mine);
  }

  void meet(int64_t block, Sight sight, int64_t a, int64_t b, int64_t head, Own& mine) {
    const int64_t unit = head * s_.blocks + block, rows = (b - a) * s_.group;
    int64_t low, high;
    blocks_.range(block, a, b, &low, &high);
    const MatrixKernels& k = *p_.products;
    k.product(rows, high - low, s_.words, mine.rows.get(), s_.row, 1,
              keys_.get() + unit * s_.keys_across + low * s_.row, s_.row * s_.panel,
              mine.scores.get() + low, kTreeKeys, false);
    const bool masked = sight == Sight::some || any_hurt_[static_cast<size_t>(unit)];
    const int64_t words = kTreeKeys / s_.pair;
    for (int64_t i = 0; i < rows; ++i) {
      if (masked && i % s_.group == 0) {
        p_.rows->see(blocks_.ends(block) + low, hurt_.data() + unit * kTreeKeys + low,
                     block * kTreeKeys + low, high - low, a + i / s_.group, mine.seen);
      }
      p_.rows->absorb(mine.scores.get() + i * kTreeKeys + low, masked ? mine.seen : nullptr,
                      high - low, scale2_, mine.state.data() + 2 * i, mine.sums.get() + i * s_.sum,
                      s_.sum, mine.weights.get() + i * words + low / s_.pair);
    }
    k.product(rows, s_.sum, (high - low) / s_.pair, mine.weights.get() + low / s_.pair, words, 1,
              values_.get() + unit * s_.keys_along + low / s_.pair * s_.panel, s_.key_panel,
              mine.sums.get(), s_.sum, true);
  }

  void finish(int64_t token, int64_t head, int64_t i, Own& mine) {
    float *sum = mine.sums.get() + i * s_.sum, *state = mine.state.data() + 2 * i;
    const float hurt = mine.hurt[static_cast<size_t>(i)],
                total = state[1] + hurt;  // hurt is 0 or NaN
    for (int64_t d = 0; d < p_.dim; ++d) sum[d] /= total;
    p_.products->emit(sum, p_.dim, p_.dtype,
                      out_ + (token * p_.heads + head) * p_.dim * bytes_of(p_.dtype));
    lse_[token * p_.heads + head] = (state[0] + std::log2(total)) / kLog2e;
  }

  const TreeProblem& p_;
  char* out_;
  float* lse_;
  const TreeSizes s_;
  const KeyBlocks blocks_;
  const float scale2_ = p_.scale * kLog2e;
  Scratch keys_, values_;
  std::vector<float> hurt_;
  std::vector<char> any_hurt_;
  std::vector<Own> own_;
};

}  // namespace

void tree_forward(const TreeProblem& p, char* out, float* lse) { Forward(p, out, lse).run(); }

}  // namespace appo

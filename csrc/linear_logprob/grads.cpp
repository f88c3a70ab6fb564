// Backward of the fused output head. For every chunk of the vocabulary and block of rows, three
// steps with all threads:
//
//   1  logits again (or what forward has cached of them), from them the gradient G of each logit,
//      rounded to bf16 where products are in bf16  [rows, chunk]
//   2  dw[chunk, H] += Gᵀ h      3  dh[rows, H] += G w
//
// Chunks and blocks come in order, the size of a chunk follows from H alone, and every item of a
// result belongs to one thread: the number of threads changes no bit, and a row of dh does not
// depend on its neighbours. Rows that several targets share get the sum of their gradients before
// it is rounded, so they cost one row of each product.
//
// The float32 sums of a bf16 dh take no float32 matrix: the upper halves live in the result, the
// lower ones in scratch.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "common/units.h"
#include "linear_logprob/problem.h"

namespace appo {
namespace {

constexpr int64_t kGroup =
    96;  // rows of dw or dh per unit of work; a multiple of the micro-kernel's 6
constexpr int64_t kPackRows = 64;

// Most columns per chunk and rows per block: packed parts of w and h stay near 2 MiB. Memory is
// short where dh is summed in halves; half the size costs 2 %. No bit of dh depends on it: a
// product sums 512 columns at a time.
int64_t side(int64_t width, bool short_of_memory) {
  return width > 2048 ? 256 : width > 1024 || short_of_memory ? 512 : 1024;
}

class Backward {
 public:
  Backward(const LinearProblem& p, const LinearGrads& g)
      : p_(p),
        g_(g),
        k_(*p.k),
        need_h_(g.dh_f32 || g.dh_bf16),
        need_w_(g.dw != nullptr),
        width_(p.width()),
        chunk_(std::min(round_up(p.vocab, kTile), side(width_, g.dh_low))),
        block_(std::min(round_up(p.used_rows, 2), side(width_, g.dh_low))),
        ld_g_((chunk_ + 32) / k_.pair),
        ld_pairs_(chunk_ + 16),
        panel_across_(k_.panel * p.row_words()),
        panel_h_(k_.panel * ceil_div(block_, k_.pair)),
        panel_w_(k_.panel * chunk_ / k_.pair),
        h_(block_ * p.row_words()),
        h_along_(need_w_ ? ceil_div(width_, k_.panel) * panel_h_ : 0),
        w_across_(chunk_ / k_.panel * panel_across_),
        w_along_(need_h_ ? ceil_div(width_, k_.panel) * panel_w_ : 0),
        g_rows_(block_ * ld_g_),
        g_pairs_(need_w_ && k_.pair == 2 ? block_ / 2 * ld_pairs_ : 0),
        dw_(need_w_ && p.used_rows > block_ ? chunk_ * width_ : 0),
        own_(static_cast<size_t>(p.threads)) {}

  void run() {
    if (g_.d_scale) std::fill_n(g_.d_scale, p_.users[p_.used_rows], 0.0f);
    const int64_t blocks = ceil_div(p_.used_rows, block_);
    for (v0_ = 0; v0_ < p_.vocab; v0_ += chunk_) {
      columns_ = std::min(chunk_, p_.vocab - v0_);
      for (int64_t b = 0; b < blocks; ++b) {
        row0_ = b * block_;
        rows_ = std::min(block_, p_.used_rows - row0_);
        pack(b == 0, v0_ == 0 || blocks > 1);
        logit_gradients();
        products(b == 0, b + 1 == blocks);
      }
    }
  }

 private:
  struct Own {  // of one thread
    explicit Own(const LinearKernels& k, int64_t width, int64_t row_words)
        : stage(k.lanes * row_words), x(kRows * kTile), g((kRows + 1) * kTile), c(kGroup * width) {}
    Scratch stage, x, g, c;
  };

  Own& own(int64_t part) {
    auto& mine = own_[static_cast<size_t>(part)];
    if (!mine) mine = std::make_unique<Own>(k_, width_, p_.row_words());
    return *mine;
  }

  // --- 0: w and h in the layouts of the products
  // ---------------------------------------------------------------------

  void pack(bool new_chunk, bool new_block) {
    // Panels of cached tiles are not needed.
    const int64_t cached =
        std::clamp<int64_t>(p_.cached_tiles * kTile - v0_, 0, round_up(columns_, k_.panel)) /
        k_.panel;
    const int64_t across = new_chunk ? ceil_div(columns_, k_.panel) - cached : 0;
    const int64_t along = new_chunk && need_h_ ? ceil_div(columns_, kPackRows) : 0;
    const int64_t hidden = new_block ? ceil_div(rows_, kPackRows) : 0;
    run_units(across + along + hidden, p_.threads, [&](int64_t unit, int64_t part) {
      float* stage = own(part).stage.get();
      if (unit < across) {
        const int64_t j = cached + unit;
        k_.pack_across(p_.w, v0_ + j * k_.panel, std::min(k_.panel, columns_ - j * k_.panel),
                       width_, stage, w_across_.get() + j * panel_across_);
      } else if (unit < across + along) {
        const int64_t first = (unit - across) * kPackRows,
                      last = std::min(first + kPackRows, columns_);
        for (int64_t i = first; i < last; i += k_.pair) {
          fetch_pair(p_.w, v0_, i, columns_, stage);
          k_.pack_along(stage, stage + p_.row_words(), width_,
                        w_along_.get() + i / k_.pair * k_.panel, panel_w_);
        }
      } else {
        const int64_t first = (unit - across - along) * kPackRows,
                      last = std::min(first + kPackRows, rows_);
        for (int64_t i = first; i < last; i += k_.pair) {
          float* to = h_.get() + i * p_.row_words();
          fetch_pair(p_.h, row0_, i, rows_, to);
          if (need_w_)
            k_.pack_along(to, to + p_.row_words(), width_, h_along_.get() + i / k_.pair * k_.panel,
                          panel_h_);
        }
      }
    });
  }

  // `pair` rows from `first + i`, zero beyond `end`.
  void fetch_pair(const Matrix& a, int64_t first, int64_t i, int64_t end, float* out) {
    k_.fetch(a, first + i, width_, out);
    if (k_.pair == 1) return;
    if (i + 1 < end) {
      k_.fetch(a, first + i + 1, width_, out + p_.row_words());
    } else {
      std::fill_n(out + p_.row_words(), p_.row_words(), 0.0f);
    }
  }

  // --- 1: gradients of the logits
  // ------------------------------------------------------------------------------------

  void logit_gradients() {
    const int64_t step = std::clamp<int64_t>(round_up(ceil_div(rows_, p_.threads), 6), 6, kRows);
    run_units(ceil_div(rows_, step), p_.threads, [&](int64_t unit, int64_t part) {
      const int64_t first = unit * step, rows = std::min(step, rows_ - first);
      for (int64_t j = 0; j < columns_; j += kTile)
        tile(own(part), first, rows, j, std::min(kTile, columns_ - j));
    });
  }

  void tile(Own& mine, int64_t first, int64_t rows, int64_t j, int64_t columns) {
    float *x = mine.x.get(), *g = mine.g.get();
    if ((v0_ + j) / kTile >= p_.cached_tiles) {
      k_.product(rows, columns, p_.words(), h_.get() + first * p_.row_words(), p_.row_words(), 1,
                 w_across_.get() + j / k_.panel * panel_across_, panel_across_, x, kTile, false);
    }
    for (int64_t i = 0; i < rows; ++i)
      row(x + i * kTile, g + i * kTile, row0_ + first + i, v0_ + j, columns);
    std::fill_n(g + rows * kTile, kTile, 0.0f);  // the partner of an odd last row
    for (int64_t i = 0; i < rows; i += 2) {
      float* to = g_rows_.get() + (first + i) * ld_g_ + j / k_.pair;
      float* pairs =
          need_w_ && k_.pair == 2 ? g_pairs_.get() + (first + i) / 2 * ld_pairs_ + j : nullptr;
      k_.store(g + i * kTile, g + (i + 1) * kTile, columns, to, to + ld_g_, pairs);
    }
  }

  void row(float* x, float* g, int64_t i, int64_t v0, int64_t columns) {
    if (p_.softcap > 0.0f) k_.cap(x, columns, p_.softcap);
    for (int64_t n = p_.users[i]; n < p_.users[i + 1]; ++n) {
      const float scale = p_.scale[n], scale2 = scale * kLog2e;
      const float plogp_factor = g_.plogp_factor ? g_.plogp_factor[n] * scale : 0.0f;
      const GradRow factors{scale2, g_.m[n], g_.log2s[n], g_.p_factor[n] * scale, plogp_factor};
      const int64_t column = p_.column[n] - v0;
      const bool here = column >= 0 && column < columns;
      const bool add = n > p_.users[i];
      const float d_logp = g_.d_logp[n] * scale;
      float dot, log2p = 0.0f;
      if (const char* record = p_.record(n, v0)) {
        const float others = here && add ? g[column] : 0.0f;
        dot = k_.grad_cached(record, g, columns, factors, add);
        if (here) {  // of the target the exact p: what remains of p - 1 must not be the rounding of
                     // p
          std::memcpy(&log2p, p_.cache_of(n), sizeof log2p);
          log2p = log2p - factors.m - factors.log2s;
          g[column] = others + std::exp2(log2p) * (factors.p_factor - factors.plogp_factor * log2p);
        }
      } else {
        dot = k_.grad(x, g, columns, factors, add);
        if (here) {
          const float y = x[column] * scale2;
          log2p = (y < kEmpty ? kEmpty : y) - factors.m - factors.log2s;
        }
      }
      if (here) {
        g[column] += d_logp;
        dot += d_logp * log2p;
      }
      if (g_.d_scale) g_.d_scale[n] += dot / scale;
    }
    if (p_.softcap > 0.0f) k_.slope(x, g, columns, p_.softcap);
  }

  // --- 2, 3: the products
  // --------------------------------------------------------------------------------------------

  void products(bool first_block, bool last_block) {
    const int64_t of_w = need_w_ ? ceil_div(columns_, group(columns_)) : 0;
    const int64_t of_h = need_h_ ? ceil_div(rows_, group(rows_)) : 0;
    const bool in_place = g_.dh_f32 && !p_.h.rows && p_.hidden == width_;
    run_units(of_w + of_h, p_.threads, [&](int64_t unit, int64_t part) {
      if (unit < of_w) {
        const int64_t first = unit * group(columns_);
        float* sum = dw_.get() ? dw_.get() + first * width_
                               : own(part).c.get();  // with one block it need not be kept
        dw_group(first, sum, first_block, last_block);
      } else {
        dh_group((unit - of_w) * group(rows_), own(part).c.get(), in_place);
      }
    });
  }

  int64_t group(int64_t count) const {
    return std::clamp<int64_t>(round_up(ceil_div(count, p_.threads), 6), 6, kGroup);
  }

  void dw_group(int64_t first, float* sum, bool first_block, bool last_block) {
    const int64_t count = std::min(group(columns_), columns_ - first);
    const float* g = k_.pair == 2 ? g_pairs_.get() : g_rows_.get();
    k_.product(count, width_, ceil_div(rows_, k_.pair), g + first, 1,
               k_.pair == 2 ? ld_pairs_ : ld_g_, h_along_.get(), panel_h_, sum, width_,
               !first_block);
    if (!last_block) return;
    const int64_t row_bytes = p_.hidden * bytes_of(g_.dw_dtype);
    for (int64_t i = 0; i < count; ++i) {
      k_.emit(sum + i * width_, p_.hidden, g_.dw_dtype, g_.dw + (v0_ + first + i) * row_bytes);
    }
  }

  void dh_group(int64_t first, float* sum, bool in_place) {
    const int64_t count = std::min(group(rows_), rows_ - first);
    const bool old = v0_ > 0, last = v0_ + chunk_ >= p_.vocab;
    if (in_place) sum = g_.dh_f32 + at(row0_ + first);
    for (int64_t i = 0; old && !in_place && i < count; ++i)
      load_sum(row0_ + first + i, sum + i * width_);
    k_.product(count, width_, ceil_div(columns_, k_.pair), g_rows_.get() + first * ld_g_, ld_g_, 1,
               w_along_.get(), panel_w_, sum, width_, old);
    for (int64_t i = 0; !in_place && i < count; ++i)
      store_sum(row0_ + first + i, sum + i * width_, last);
  }

  int64_t at(int64_t i) const { return (p_.h.rows ? p_.h.rows[i] : i) * p_.hidden; }

  void load_sum(int64_t i, float* sum) const {
    if (g_.dh_f32) {
      std::memcpy(sum, g_.dh_f32 + at(i), static_cast<size_t>(p_.hidden) * 4);
      return;
    }
    const uint16_t *high = g_.dh_bf16 + at(i), *low = g_.dh_low + i * p_.hidden;
    for (int64_t j = 0; j < p_.hidden; ++j) {
      const uint32_t bits = static_cast<uint32_t>(high[j]) << 16 | low[j];
      std::memcpy(sum + j, &bits, 4);
    }
  }

  void store_sum(int64_t i, const float* sum, bool last) const {
    if (g_.dh_f32) {
      std::memcpy(g_.dh_f32 + at(i), sum, static_cast<size_t>(p_.hidden) * 4);
      return;
    }
    uint16_t *high = g_.dh_bf16 + at(i), *low = g_.dh_low + i * p_.hidden;
    if (last) {
      k_.emit(sum, p_.hidden, Dtype::bf16, high);
      return;
    }
    for (int64_t j = 0; j < p_.hidden; ++j) {
      uint32_t bits;
      std::memcpy(&bits, sum + j, 4);
      high[j] = static_cast<uint16_t>(bits >> 16);
      low[j] = static_cast<uint16_t>(bits);
    }
  }

  const LinearProblem& p_;
  const LinearGrads& g_;
  const LinearKernels& k_;
  const bool need_h_, need_w_;
  const int64_t width_, chunk_, block_, ld_g_, ld_pairs_, panel_across_, panel_h_, panel_w_;
  Scratch h_, h_along_, w_across_, w_along_, g_rows_, g_pairs_, dw_;
  std::vector<std::unique_ptr<Own>> own_;
  int64_t v0_ = 0, columns_ = 0, row0_ = 0, rows_ = 0;
};

}  // namespace

void linear_backward(const LinearProblem& p, const LinearGrads& g) { Backward(p, g).run(); }

}  // namespace appo

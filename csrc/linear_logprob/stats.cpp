// Forward of the fused output head: (m, s, u, z) per target from tiles of logits that never leave
// the cache.
//
// The vocabulary is cut into at most kSplits contiguous parts that depend on V alone; the
// statistics of a target over a part are merged in the order of the parts. So its bits depend on
// its row of h, on w and on V, and not on the batch, the row block or the number of threads.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "common/units.h"
#include "linear_logprob/problem.h"

namespace appo {
namespace {

constexpr int64_t kSplits = 16;
constexpr int64_t kRowBlock =
    1024;  // rows that share one packing of a tile of w: it costs 1 % of their products

struct Stats {
  float m, s, u, z;
};

Stats merge(const Stats& a, const Stats& b) {
  const float m = std::max(a.m, b.m), da = a.m - m, db = b.m - m;
  const float wa = std::exp2(da), wb = std::exp2(db);
  return {m, wa * a.s + wb * b.s, wa * (a.u + da * a.s) + wb * (b.u + db * b.s), a.z + b.z};
}

// What one thread needs for a block of rows.
class Block {
 public:
  Block(const LinearProblem& p, int64_t rows, int64_t targets)
      : p_(p),
        k_(*p.k),
        h_(rows * p.row_words()),
        w_(kTile * p.row_words()),
        stage_(k_.lanes * p.row_words()),
        x_(kRows * kTile),
        state_(targets * 3 * k_.lanes),
        z_(targets) {}

  // Statistics of the targets of rows row0 … row1-1 over columns v0 … v1-1.
  void run(int64_t row0, int64_t row1, int64_t v0, int64_t v1, Stats* out) {
    const int64_t first = p_.users[row0], count = p_.users[row1] - first;
    for (int64_t i = row0; i < row1; ++i)
      k_.fetch(p_.h, i, p_.width(), h_.get() + (i - row0) * p_.row_words());
    for (int64_t n = 0; n < count; ++n) {
      float* state = state_.get() + n * 3 * k_.lanes;
      std::fill_n(state, k_.lanes, kEmpty);
      std::fill_n(state + k_.lanes, 2 * k_.lanes, 0.0f);
      z_.get()[n] = 0.0f;
    }
    for (int64_t v = v0; v < v1; v += kTile) tile(row0, row1, v, std::min(v1, v + kTile));
    for (int64_t n = 0; n < count; ++n) {
      float merged[3];
      k_.collapse(state_.get() + n * 3 * k_.lanes, merged);
      out[first + n] = {merged[0], merged[1], merged[2], z_.get()[n]};
    }
  }

 private:
  void tile(int64_t row0, int64_t row1, int64_t v0, int64_t v1) {
    const int64_t panel = k_.panel * p_.row_words(), columns = v1 - v0;
    for (int64_t j = 0; j < columns; j += k_.panel) {
      k_.pack_across(p_.w, v0 + j, std::min(k_.panel, columns - j), p_.width(), stage_.get(),
                     w_.get() + j / k_.panel * panel);
    }
    for (int64_t r = row0; r < row1; r += kRows) {
      const int64_t rows = std::min(kRows, row1 - r);
      k_.product(rows, columns, p_.words(), h_.get() + (r - row0) * p_.row_words(), p_.row_words(),
                 1, w_.get(), panel, x_.get(), kTile, false);
      for (int64_t i = 0; i < rows; ++i)
        row(x_.get() + i * kTile, r + i, p_.users[row0], v0, columns);
    }
  }

  void row(float* x, int64_t i, int64_t first, int64_t v0, int64_t columns) {
    if (p_.softcap > 0.0f) k_.cap(x, columns, p_.softcap);
    for (int64_t n = p_.users[i]; n < p_.users[i + 1]; ++n) {
      const float scale2 = p_.scale[n] * kLog2e;
      char* record = p_.record(n, v0);
      k_.stats(x, columns, scale2, state_.get() + (n - first) * 3 * k_.lanes, record);
      const int64_t column = p_.column[n] - v0;
      if (column < 0 || column >= columns) continue;
      const float z = x[column] * scale2;
      z_.get()[n - first] = z < kEmpty ? kEmpty : z;
      if (record) std::memcpy(p_.cache_of(n), &z_.get()[n - first], sizeof z);
    }
  }

  const LinearProblem& p_;
  const LinearKernels& k_;
  Scratch h_, w_, stage_, x_, state_, z_;
};

}  // namespace

void linear_forward(const LinearProblem& p, float* out) {
  const int64_t n = p.users[p.used_rows];
  const int64_t tiles = ceil_div(p.vocab, kTile), splits = std::min(kSplits, tiles);
  // Fewer rows per block where threads would be idle otherwise.
  const int64_t wanted =
      std::max(ceil_div(p.used_rows, kRowBlock), ceil_div(2 * p.threads, splits));
  const int64_t step = std::min(round_up(ceil_div(p.used_rows, wanted), kRows), p.used_rows);
  const int64_t blocks = ceil_div(p.used_rows, step);
  int64_t targets = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    targets = std::max(targets, p.users[std::min((b + 1) * step, p.used_rows)] - p.users[b * step]);
  }
  Scratch parts(splits * n * 4);
  auto* stats = reinterpret_cast<Stats*>(parts.get());
  std::vector<std::unique_ptr<Block>> scratch(static_cast<size_t>(p.threads));
  run_units(blocks * splits, p.threads, [&](int64_t unit, int64_t part) {
    auto& block = scratch[static_cast<size_t>(part)];
    if (!block) block = std::make_unique<Block>(p, step, targets);
    const int64_t split = unit % splits, row0 = unit / splits * step;
    block->run(row0, std::min(row0 + step, p.used_rows), tiles * split / splits * kTile,
               std::min(tiles * (split + 1) / splits * kTile, p.vocab), stats + split * n);
  });
  for (int64_t i = 0; i < n; ++i) {
    Stats total = stats[i];
    for (int64_t split = 1; split < splits; ++split) total = merge(total, stats[split * n + i]);
    out[i] = total.m;
    out[n + i] = total.s;
    out[2 * n + i] = total.u;
    out[3 * n + i] = total.z;
  }
}

}  // namespace appo

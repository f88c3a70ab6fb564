// See packed.h.

#include "decoder/packed.h"

#include <cstring>
#include <utility>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "common/team.h"

namespace appo {
namespace {

void pack_panel(const MatrixKernels& k, const Matrix& w, int64_t first, int64_t count,
                int64_t width, float* out) {
  const Scratch stage(k.lanes * width);
  k.pack_across(w, first, count, width, stage.get(), out);
}

}  // namespace

Scratch panel_memory(int64_t floats) {
#ifdef __linux__
  constexpr int64_t huge = 2 << 20;
  if (floats * 4 >= huge / 4) {
    Scratch memory(round_up(floats * 4, huge) / 4, huge);
    (void)madvise(memory.get(), static_cast<size_t>(round_up(floats * 4, huge)),
                  MADV_HUGEPAGE);  // a hint
    return memory;
  }
#endif
  return Scratch(floats);
}

void pack(Packed& to, const Matrix& w, const float* bias, int64_t threads) {
  const MatrixKernels& k = *to.k;
  run_team(to.panels(), threads, [&](int64_t p, int64_t) {
    pack_panel(k, w, to.first(p), to.count(p), to.width(), to.data + p * to.panel_words());
  });
  to.bias.clear();
  if (!bias) return;
  to.bias.resize(static_cast<size_t>(to.panels() * k.panel));
  for (int64_t p = 0; p < to.panels(); ++p) {
    std::memcpy(&to.bias[p * k.panel], bias + to.first(p), static_cast<size_t>(to.count(p)) * 4);
  }
}

void adapt(Packed& to, const Matrix& down, const Matrix& up) {
  const MatrixKernels& k = *to.k;
  const int64_t rank = up.columns, width = round_up(rank, 32),
                down_panels = ceil_div(rank, k.panel);
  const int64_t up_words = width / k.pair * k.panel;
  Scratch new_down(down_panels * to.panel_words()), new_up(rank ? to.panels() * up_words : 0);
  for (int64_t p = 0; p < down_panels; ++p) {
    const int64_t first = p * k.panel, count = std::min(k.panel, rank - first);
    pack_panel(k, down, first, count, to.width(), new_down.get() + p * to.panel_words());
  }
  for (int64_t p = 0; rank && p < to.panels(); ++p) {
    pack_panel(k, up, to.first(p), to.count(p), width, new_up.get() + p * up_words);
  }
  to.down = std::move(new_down);
  to.up = std::move(new_up);
  to.rank = rank;
}

Lowered::Lowered(const LayerKernels& k, const Packed& w, Rows x, int64_t rows) {
  if (!w.rank) return;
  const MatrixKernels& linear = *k.linear;
  const int64_t width = round_up(w.rank, 32), panels = ceil_div(w.rank, linear.panel),
                ldc = panels * linear.panel;
  stride_ = width / linear.pair;
  numbers_ = Scratch(rows * stride_);
  const Scratch sums(rows * ldc);
  for (int64_t p = 0; p < panels; ++p) {
    const float* panel = w.down.get() + p * w.panel_words();
    k.product(rows, linear.panel, w.words(), x.data, x.stride, panel, sums.get() + p * linear.panel,
              ldc);
  }
  std::memset(numbers_.get(), 0, static_cast<size_t>(rows * stride_) * 4);
  for (int64_t i = 0; i < rows; ++i) {
    linear.emit(sums.get() + i * ldc, w.rank, k.dtype, numbers_.get() + i * stride_);
  }
}

void linear(const LayerKernels& k, const Packed& w, Rows x, const Lowered& low, int64_t row,
            int64_t rows, int64_t p, int64_t count, float* y, float* scratch) {
  const MatrixKernels& table = *k.linear;
  const int64_t panel = table.panel, ld = count * panel;
  const float* from = x.data + row * x.stride;
  const int64_t low_words = ceil_div(w.rank, table.pair),
                up_words = round_up(w.rank, 32) / table.pair * panel;
  for (int64_t j = 0; j < count; ++j) {
    const int64_t columns = w.count(p + j);
    k.product(rows, columns, w.words(), from, x.stride, w.data + (p + j) * w.panel_words(),
              y + j * panel, ld);
    const float* bias = w.bias.empty() ? nullptr : &w.bias[(p + j) * panel];
    float* more = nullptr;
    if (w.rank) {
      more = scratch + j * panel;
      const Rows t = low.from(row);
      k.product(rows, columns, low_words, t.data, t.stride, w.up.get() + (p + j) * up_words, more,
                ld);
    }
    for (int64_t i = 0; i < rows; ++i) {
      k.finish(y + i * ld + j * panel, bias, more ? more + i * ld : nullptr, columns);
    }
  }
}

void logits(const LayerKernels& k, const Packed& w, bool of_floats, Rows x, int64_t rows,
            float* out, int64_t threads) {
  const auto product = of_floats ? k.product_of_floats : k.product;
  const int64_t panel = k.linear->panel, blocks = ceil_div(rows, kLayerRows),
                tile = std::min(rows, kLayerRows) * panel;
  threads = useful_threads(w, rows, threads);
  const Scratch tiles(tile * threads);
  run_team(w.panels() * blocks, threads, [&](int64_t unit, int64_t part) {
    const int64_t p = unit / blocks, row = unit % blocks * kLayerRows,
                  some = std::min(kLayerRows, rows - row);
    float* y = tiles.get() + part * tile;
    product(some, w.count(p), w.words(), x.data + row * x.stride, x.stride,
            w.data + p * w.panel_words(), y, panel);
    for (int64_t i = 0; i < some; ++i) {
      std::memcpy(out + (row + i) * w.out + w.first(p), y + i * panel,
                  static_cast<size_t>(w.count(p)) * 4);
    }
  });
}

}  // namespace appo

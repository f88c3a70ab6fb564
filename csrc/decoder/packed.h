// A linear whose weights are kept as panels of words (see common/matrix.h), and the low-rank
// adapter applied beside it.
#pragma once

#include <algorithm>
#include <vector>

#include "common/scratch.h"
#include "decoder/decoder.h"

namespace appo {

// y = x wᵀ + bias. Panel p holds `panel` rows of w from first(p) on, word row by word row, so that
// a product of few rows reads the weights once, in the order of memory. With `half` > 0 panels of
// the rows below and from `half` on alternate: a gate and the up projection it meets are
// neighbours.
struct Packed {
  const MatrixKernels* k = nullptr;
  int64_t in = 0, out = 0, half = 0;
  float* data = nullptr;
  std::vector<float> bias;  // [panels][panel], or empty

  int64_t rank = 0;  // of the adapter; 0: none
  Scratch down{0}, up{0};

  int64_t width() const { return round_up(in, 32); }       // numbers per row, zeros at the end
  int64_t words() const { return ceil_div(in, k->pair); }  // words per row that count
  int64_t panels() const { return half ? 2 * ceil_div(half, k->panel) : ceil_div(out, k->panel); }
  int64_t panel_words() const { return width() / k->pair * k->panel; }
  int64_t floats() const { return panels() * panel_words(); }  // size of `data`
  int64_t first(int64_t p) const { return half ? p / 2 * k->panel + p % 2 * half : p * k->panel; }
  int64_t end(int64_t p) const { return half && p % 2 == 0 ? half : out; }
  int64_t count(int64_t p) const { return std::min(k->panel, end(p) - first(p)); }
};

// How many of `threads` the product of `rows` rows is worth: to wake one, and to be woken by it,
// takes 15 to 30 us, the time of 2 or 3 million multiplications; reading a weight takes as long as
// 8 of them.
inline int64_t useful_threads(const Packed& w, int64_t rows, int64_t threads) {
  const int64_t work = w.in * w.out / 1000 * std::max<int64_t>(rows, 8);  // in thousands
  return std::clamp<int64_t>(work / 2500, 1, std::max<int64_t>(threads, 1));
}

// Memory for panels that stay, in whole huge pages where the system has them: they are read from
// end to end at every step (on a virtual Zen 4 a sum over such memory runs at 30 GB/s, in pages of
// 4 KiB at 21). First use is slower (0.5 against 0.15 s for 256 MiB that the host has to find):
// nothing for what lives as long as the engine.
Scratch panel_memory(int64_t floats);

void pack(Packed& to, const Matrix& w, const float* bias, int64_t threads);
// down[rank, in] and up[out, rank]; rank 0 removes the adapter.
void adapt(Packed& to, const Matrix& down, const Matrix& up);

// Rows of numbers as words: row i starts at data + i·stride.
struct Rows {
  const float* data;
  int64_t stride;
};

// t = round(x downᵀ) for all rows of x, the first half of the adapter; nothing without one.
class Lowered {
 public:
  Lowered(const LayerKernels& k, const Packed& w, Rows x, int64_t rows);
  Rows from(int64_t row) const { return {numbers_.get() + row * stride_, stride_}; }

 private:
  int64_t stride_ = 0;
  Scratch numbers_{0};
};

// y[rows][count · panel] = the linear of `rows` rows, for the panels p … p+count-1, rounded as the
// model's dtype. scratch: as large as y.
void linear(const LayerKernels& k, const Packed& w, Rows x, const Lowered& low, int64_t row,
            int64_t rows, int64_t p, int64_t count, float* y, float* scratch);

// out[rows][w.out] = x wᵀ in float32, without bias and adapter. of_floats: x holds floats (stride
// in floats) while w was packed from bfloat16 numbers.
void logits(const LayerKernels& k, const Packed& w, bool of_floats, Rows x, int64_t rows,
            float* out, int64_t threads);

}  // namespace appo

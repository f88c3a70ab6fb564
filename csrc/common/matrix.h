// Number types, matrices, and the matrix product of one instruction set: what all operations share.
// No external symbol may come from this file: it is compiled with wide instructions too, and the
// linker would be free to use such a copy on any machine (hence `static`).
//
// All matrix products run on 32-bit words: two bf16 numbers that are neighbours along the summed
// dimension, or one float. A word product is one `vdpbf16ps` or one FMA, so all products share one
// micro-kernel (simd/product.h). The right factor is packed into panels of `panel` columns, [words
// along the sum][panel].
#pragma once

#include <cstdint>

namespace appo {

constexpr float kEmpty = -1e30f;  // stands for minus infinity, as in kernels/common/stats.py
constexpr float kLog2e = 1.44269504088896341f;

enum class Dtype { f32, bf16, f16 };
static inline int64_t bytes_of(Dtype d) { return d == Dtype::f32 ? 4 : 2; }

// A matrix as Python holds it; strides in elements. `rows`, if any, maps the row that we count to
// the one in memory.
struct Matrix {
  const char* data;
  Dtype dtype;
  int64_t columns, row_stride, column_stride;
  const int64_t* rows;
};
static inline const char* row_of(const Matrix& a, int64_t i) {
  return a.data + (a.rows ? a.rows[i] : i) * a.row_stride * bytes_of(a.dtype);
}

// One instruction set. Rows of words or floats may be read and written up to the next multiple of
// 16 items.
struct MatrixKernels {
  int64_t pair;   // numbers per word: 2 (bf16) or 1 (float)
  int64_t panel;  // columns per panel
  int64_t lanes;  // columns per vector

  // out[0 … width) = row i of a as bf16 or float, zero from a.columns on; width is a multiple
  // of 32.
  void (*fetch)(const Matrix& a, int64_t i, int64_t width, void* out);
  // One panel: out[words][panel] from `count` rows, starting at `first`, summed along columns.
  // stage: lanes·width numbers.
  void (*pack_across)(const Matrix& a, int64_t first, int64_t count, int64_t width, void* stage,
                      float* out);
  // One word row of all panels from `pair` rows of numbers, summed along rows. out + j·stride is
  // row k of panel j.
  void (*pack_along)(const void* row0, const void* row1, int64_t width, float* out, int64_t stride);
  // c[m, n] (+)= Σ_k a[m·row + k·step] · b[panel of n][k][…]; panels are `stride` words apart.
  void (*product)(int64_t rows, int64_t columns, int64_t words, const float* a, int64_t row,
                  int64_t step, const float* b, int64_t stride, float* c, int64_t ldc, bool add);
  // Two rows of g, rounded to numbers: row by row and, for bf16, as words along the rows unless
  // `pairs` is null.
  void (*store)(const float* g0, const float* g1, int64_t n, void* row0, void* row1, float* pairs);
  void (*emit)(const float* c, int64_t n, Dtype dtype, void* out);  // rounds to nearest even
};

const MatrixKernels& matrix_avx512_bf16();
const MatrixKernels& matrix_avx512();
const MatrixKernels& matrix_avx2();

}  // namespace appo

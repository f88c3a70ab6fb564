// The fused output head on a CPU: what its parts share. No external symbol may come from this file: it is compiled with
// wide instructions too, and the linker would be free to use such a copy on any machine (hence `static`).
//
//   python.cpp         checks what Python hands over, chooses the instruction set, exports the functions
//   problem.h   the checked problem, scratch memory, units of work over threads
//   stats.cpp   forward: the order of the work, threads, scratch memory
//   grads.cpp   backward, likewise
//   kernels.h   the arithmetic (common/simd/product.h, rows.h, common/simd/math.h), templates that kernels_<isa>.cpp
//                      compile into a table of functions
//
// All matrix products run on 32-bit words: two bf16 numbers that are neighbours along the summed dimension, or one
// float. A word product is one `vdpbf16ps` or one FMA, so the three products share one micro-kernel:
//
//   logits[t, v] = Σ_h  h·w     dw[v, h] = Σ_t g·h     dh[t, h] = Σ_v g·w
//
// The right factor is packed into panels of `panel` columns, [words along the sum][panel]. Nothing is kept between
// calls: a packed copy of w would double the memory of the head and could be stale after an optimizer step.
#pragma once

#include <cstdint>

namespace appo {

constexpr float kEmpty = -1e30f;  // stands for minus infinity, as in kernels/stats.py
constexpr float kLog2e = 1.44269504088896341f;
constexpr int64_t kTile = 256;  // columns per tile of logits; statistics are rescaled once per tile
constexpr int64_t kRows = 48;   // rows per tile of logits: 48 x 256 floats stay in L2 beside the panel

// Forward may keep 2^(x2 - m) of the leading tiles of every target as float16, m being the largest of its lane so far.
// Per target: z in kKeptHead bytes, then one record per tile: kTile halves and the m of each lane. A half holds
// 2^(x2 - m + kKeptRaise), so that it keeps its 11 bits down to 2^-29 of the largest in its lane.
constexpr float kKeptRaise = 15.0f;
constexpr int64_t kKeptHead = 64;
constexpr int64_t kKeptTile = kTile * 2 + 64;

enum class Dtype { f32, bf16, f16 };
static inline int64_t bytes_of(Dtype d) { return d == Dtype::f32 ? 4 : 2; }

// A matrix as Python holds it; strides in elements. `rows`, if any, maps the row that we count to the one in memory.
struct Matrix {
  const char* data;
  Dtype dtype;
  int64_t columns, row_stride, column_stride;
  const int64_t* rows;
};
static inline const char* row_of(const Matrix& a, int64_t i) {
  return a.data + (a.rows ? a.rows[i] : i) * a.row_stride * bytes_of(a.dtype);
}

// g = p (constant - bent log2 p) with log2 p = (x scale2 - m) - log2s; constant and bent carry the factor `scale`.
struct GradRow {
  float scale2, m, log2s, constant, bent;
};

// One instruction set. Rows of words or floats may be read and written up to the next multiple of 16 items.
struct LinearKernels {
  int64_t pair;   // numbers per word: 2 (bf16) or 1 (float)
  int64_t panel;  // columns per panel
  int64_t lanes;  // columns per vector; statistics are kept per lane

  // out[0 … width) = row i of a as bf16 or float, zero from a.columns on; width is a multiple of 32.
  void (*fetch)(const Matrix& a, int64_t i, int64_t width, void* out);
  // One panel: out[words][panel] from `count` rows, starting at `first`, summed along columns. stage: lanes·width
  // numbers.
  void (*pack_across)(const Matrix& a, int64_t first, int64_t count, int64_t width, void* stage, float* out);
  // One word row of all panels from `pair` rows of numbers, summed along rows. out + j·stride is row k of panel j.
  void (*pack_along)(const void* row0, const void* row1, int64_t width, float* out, int64_t stride);
  // c[m, n] (+)= Σ_k a[m·row + k·step] · b[panel of n][k][…]; panels are `stride` words apart.
  void (*product)(int64_t rows, int64_t columns, int64_t words, const float* a, int64_t row, int64_t step,
                  const float* b, int64_t stride, float* c, int64_t ldc, bool add);

  void (*cap)(float* x, int64_t n, float softcap);  // x = softcap · tanh(x / softcap)
  // state[3][lanes] (m, s, u) absorbs n logits; `record`, if any, keeps them. `collapse` merges the lanes into out[3].
  void (*stats)(const float* x, int64_t n, float scale2, float* state, char* record);
  void (*collapse)(const float* state, float* out);
  // g (+)= the gradient of n logits; returns Σ g log2 p. Columns n … next multiple of the lanes become 0.
  float (*grad)(const float* x, float* g, int64_t n, const GradRow& row, bool add);
  float (*grad_kept)(const char* record, float* g, int64_t n, const GradRow& row, bool add);  // the same from a record
  void (*slope)(const float* capped, float* g, int64_t n, float softcap);                     // g *= 1 - tanh²
  // Two rows of g, rounded to numbers: row by row and, for bf16, as words along the rows unless `pairs` is null.
  void (*store)(const float* g0, const float* g1, int64_t n, void* row0, void* row1, float* pairs);
  void (*emit)(const float* c, int64_t n, Dtype dtype, void* out);  // rounds to nearest even
};

const LinearKernels& linear_avx512_bf16();
const LinearKernels& linear_avx512();
const LinearKernels& linear_avx2();

}  // namespace appo

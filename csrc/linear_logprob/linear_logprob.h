// The fused output head on a CPU: what its parts share. No external symbol may come from this file:
// it is compiled with wide instructions too, and the linker would be free to use such a copy on any
// machine (hence `static`).
//
//   python.cpp  checks what Python hands over, chooses the instruction set, exports the functions
//   problem.h   the checked problem
//   stats.cpp   forward: the order of the work, threads, scratch memory
//   grads.cpp   backward, likewise
//   rows.h      what happens to a row of logits
//   kernels.h   the same as a table of functions, beside those of common/simd: kernels_<isa>.cpp
//
// All matrix products run on 32-bit words (see common/matrix.h): two bf16 numbers that are
// neighbours along the summed dimension, or one float. The three products share one micro-kernel:
//
//   logits[t, v] = Σ_h  h·w     dw[v, h] = Σ_t g·h     dh[t, h] = Σ_v g·w
//
// The right factor is packed into panels of `panel` columns, [words along the sum][panel]. Nothing
// is kept between calls: a packed copy of w would double the memory of the head and could be stale
// after an optimizer step.
#pragma once

#include <cstdint>

#include "common/matrix.h"

namespace appo {

constexpr int64_t kTile = 256;  // columns per tile of logits; statistics are rescaled once per tile
constexpr int64_t kRows =
    48;  // rows per tile of logits: 48 x 256 floats stay in L2 beside the panel

// Forward may cache 2^(x2 - m) of the leading tiles of every target as float16, m being the largest
// of its lane so far. Per target: z in kCacheHead bytes, then one record per tile: kTile halves and
// the m of each lane. A half holds 2^(x2 - m + kCacheRaise), so that it keeps its 11 bits down to
// 2^-29 of the largest in its lane.
constexpr float kCacheRaise = 15.0f;
constexpr int64_t kCacheHead = 64;
constexpr int64_t kCacheTile = kTile * 2 + 64;

// g = p (p_factor - plogp_factor log2 p) with log2 p = (x scale2 - m) - log2s; both factors carry
// `scale`:
//   p_factor = scale (d_lse - d_logp - d_entropy entropy)     plogp_factor = scale d_entropy ln 2
struct GradRow {
  float scale2, m, log2s, p_factor, plogp_factor;
};

// One instruction set. Rows of floats may be read and written up to the next multiple of 16 items.
struct LinearKernels : MatrixKernels {
  void (*cap)(float* x, int64_t n, float softcap);  // x = softcap · tanh(x / softcap)
  // state[3][lanes] (m, s, u) absorbs n logits; `record`, if any, caches them. `collapse` merges
  // the lanes into out[3].
  void (*stats)(const float* x, int64_t n, float scale2, float* state, char* record);
  void (*collapse)(const float* state, float* out);
  // g (+)= the gradient of n logits; returns Σ g log2 p. Columns n … next multiple of the lanes
  // become 0.
  float (*grad)(const float* x, float* g, int64_t n, const GradRow& row, bool add);
  float (*grad_cached)(const char* record, float* g, int64_t n, const GradRow& row,
                       bool add);                                          // the same from a record
  void (*slope)(const float* capped, float* g, int64_t n, float softcap);  // g *= 1 - tanh²
};

const LinearKernels& linear_avx512_bf16();
const LinearKernels& linear_avx512();
const LinearKernels& linear_avx2();

}  // namespace appo

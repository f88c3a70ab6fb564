// What lies between the matrix products of a layer in training: RMSNorm, rotary positions and
// SwiGLU, forward and backward, each in one pass over memory. No external symbol may come from this
// file (see common/matrix.h).
//
//   python.cpp  checks, choice of the instruction set, threads, exported functions
//   kernels.h   the arithmetic of a row, compiled by kernels_<isa>.cpp into a table of functions
#pragma once

#include "common/matrix.h"

namespace appo {

constexpr int64_t kFusedRows =
    256;  // rows per unit of work; gradients of weights are summed per unit, then in order
constexpr int64_t kFusedChunk =
    2048;  // numbers per step of SwiGLU: its float copies stay in the caches

// Rows that `scratch` needs room for, each of fused_width(n) floats.
constexpr int64_t kFusedScratch = 4;
static inline int64_t fused_width(int64_t n) { return (n + 15) / 16 * 16; }

// Numbers come in and go out as `dtype`, all sums are float. `weight`, `cos` and `sin` are widened
// and zero up to fused_width.
struct FusedKernels {
  void (*widen)(const char* x, int64_t n, Dtype dtype, float* out);
  // y = x · factor · weight; returns factor = 1 / sqrt(mean x² + eps).
  float (*norm)(const char* x, const float* weight, int64_t n, float eps, Dtype dtype, char* y,
                float* scratch);
  // dx (unless null) and dweight (unless null; added to) from dy.
  void (*norm_grad)(const char* x, const float* weight, float factor, const char* dy, int64_t n,
                    Dtype dtype, char* dx, float* dweight, float* scratch);
  // out = gate · sigmoid(gate) · up
  void (*swiglu)(const char* gate, const char* up, int64_t n, Dtype dtype, char* out,
                 float* scratch);
  void (*swiglu_grad)(const char* gate, const char* up, const char* d_out, int64_t n, Dtype dtype,
                      char* d_gate, char* d_up, float* scratch);
  // One head: (x1, x2) → (x1 cos - x2 sin, x2 cos + x1 sin), x1 and x2 being its halves of n
  // numbers each.
  void (*rotate)(const char* x, const float* cos, const float* sin, int64_t n, Dtype dtype,
                 char* out, float* scratch);
};

const FusedKernels& fused_avx512();
const FusedKernels& fused_avx2();

}  // namespace appo

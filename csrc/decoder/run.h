// The two halves of a decoder layer, without the attention between them.
#pragma once

#include <vector>

#include "decoder/packed.h"

namespace appo {

struct LayerShape {
  int64_t hidden, ff, heads, kv_heads, head_dim;
  float eps;
};

struct LayerWeights {
  Packed qkv, o, gate_up, down;
  std::vector<float> norm1, norm2;  // [hidden]
  std::vector<float> qk_norm;       // [heads + kv_heads][head_dim], or empty
};

// x[rows][hidden] -> q[rows][heads][dim], k and v[rows][kv_heads][dim] as numbers. turn:
// [positions][dim/2] complex.
void layer_qkv(const LayerKernels& k, const LayerShape& s, const LayerWeights& w, int64_t rows,
               const float* x, const float* turn, const int64_t* positions, char* q, char* key,
               char* value, int64_t threads);

// x += o(attended), then x += down(silu(gate) · up) of the norm of x. attended: [rows][heads · dim]
// numbers.
void layer_mlp(const LayerKernels& k, const LayerShape& s, const LayerWeights& w, int64_t rows,
               const char* attended, float* x, int64_t threads);

}  // namespace appo

// One forward pass: all layers of a model, attention included, in one call.
//
//   ids -> x[rows][hidden] -> every layer: qkv, KV into the pool, attention, o, MLP
//       -> norm of the chosen rows
#pragma once

#include <vector>

#include "decoder/run.h"
#include "segment_attention/segment_attention.h"

namespace appo {

struct ForwardProblem {
  const LayerKernels* k;
  LayerShape shape;
  const std::vector<LayerWeights>* layers;
  const float* norm;  // [hidden], after the last layer
  const char* embed;  // [vocab][hidden] numbers
  const float* turn;  // [positions][dim/2] complex
  int64_t rows;       // at least 1
  const int64_t *ids, *positions;
  bool all;               // whether the hidden states of all rows are wanted, or
  const int64_t* chosen;  // of these, in any order
  int64_t chosen_count;
  char* out;                   // [chosen][hidden], as float32 or numbers
  Dtype dtype;                 // of out
  AttentionProblem attention;  // without q, k, v, out, strides and layer
  int64_t threads;
};

void layer_forward(const ForwardProblem& p);

}  // namespace appo

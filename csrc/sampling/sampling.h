// Sampling tokens from logits: what its parts share. Compiled with wide instructions too: nothing
// here may become an external symbol of theirs (see common/matrix.h).
//
//   sampling.cpp      the noise, the exact race of a few tokens, the result of a row
//   run.h             the order of the work
//   kernels.h         a row of logits, many tokens at a time, templates for kernels_<isa>.cpp
//   checks.h          what Python hands over for it
//   python.cpp        sampling from logits in memory: exported functions
//   decoder/head.cpp  the same behind the product with the output head
//
// A token is sampled by an exponential race: token i wins with the smallest E_i / e^(z_i), z = x ·
// inv_temp, where E_i is exponential noise from (seed, position, i) alone (see
// appo/rollout/native/sampling/noise.py, the definition). E = -log(1-u) is at least u and u at least the
// upper 24 bits of its hash, so one multiplication and one comparison rule nearly every token out;
// the others are compared exactly, in double. What is ruled out depends on the order of the work,
// who wins does not.
#pragma once

#include <cstdint>

#include "common/matrix.h"

namespace appo {

// How a row is sampled. scale2 = inv_temp · log2 e.
struct SampleParams {
  uint32_t key[4];
  float inv_temp, scale2;
  bool greedy;  // the largest logit; of equals the lowest id
};

// The best token so far of those that one thread has seen. Greedy rows use only x and id.
struct Race {
  double value;  // log E - z
  float x;       // its logit
  float
      bound;  // weights are e = 2^((x - m) scale2): whose upper 24 bits exceed bound · e cannot win
  int64_t id;
};

// Statistics of a row over some columns: m largest logit, then per lane s = Σ e, u = Σ e log2 e.
struct RowStats {
  float m;
  alignas(64) float s[16], u[16];
};

struct SampleKernels {
  int64_t lanes;
  // The columns first … first+n-1 of a row, in x[0 … n): joins them to the statistics and to the
  // race. Whole vectors of x are read.
  void (*absorb)(const float* x, int64_t n, int64_t first, const SampleParams& params,
                 RowStats& stats, Race& race);
  void (*hash)(const uint32_t* key, int64_t first, int64_t n,
               uint32_t* out);  // n: a multiple of the lanes
};

const SampleKernels& sample_avx512();
const SampleKernels& sample_avx2();

// Called by the kernels above; compiled for any machine.
void sample_aim(const SampleParams& params, float m, Race& race);  // sets race.bound
void sample_contend(const SampleParams& params, float m, int64_t id, float x,
                    Race& race);  // the exact comparison

}  // namespace appo

// The fused output head after the checks: what forward and backward are given.
#pragma once

#include "common/scratch.h"
#include "linear_logprob/linear_logprob.h"

namespace appo {

// The problem after the checks. `users` cuts the n targets into the rows of h that they belong to:
// row i has the targets users[i] … users[i+1]-1. h.rows lists those rows, each once.
struct LinearProblem {
  const LinearKernels* k;
  Matrix h, w;
  int64_t used_rows, vocab, hidden;
  const int64_t* users;
  const int64_t* column;
  const float* scale;
  float softcap;  // 0: none
  int64_t threads;
  char* prob_cache;  // [n][kCacheHead + cached_tiles · kCacheTile], or null
  int64_t cached_tiles;

  int64_t width() const { return round_up(hidden, 32); }       // numbers per fetched row
  int64_t words() const { return ceil_div(hidden, k->pair); }  // words per fetched row that count
  // Record of a target for the tile at column v, or null.
  char* record(int64_t n, int64_t v) const {
    return v / kTile < cached_tiles ? cache_of(n) + kCacheHead + v / kTile * kCacheTile : nullptr;
  }
  char* cache_of(int64_t n) const {
    return prob_cache + n * (kCacheHead + cached_tiles * kCacheTile);
  }
  int64_t row_words() const { return width() / k->pair; }  // words per fetched row in memory
};

void linear_forward(const LinearProblem& p, float* out);  // [4, n]

// Per target [n]; p_factor and plogp_factor (null: 0) as in GradRow, but without `scale`.
struct LinearGrads {
  const float *m, *log2s, *p_factor, *plogp_factor, *d_logp;
  float* dh_f32;      // [T, H], or
  uint16_t* dh_bf16;  // [T, H] with
  uint16_t* dh_low;   // [used rows, H]: the lower halves of the float32 sums
  char* dw;           // [V, H]
  Dtype dw_dtype;
  float* d_scale;  // [n]
};
void linear_backward(const LinearProblem& p, const LinearGrads& g);

}  // namespace appo

// The softmax step of attention over a vector type V. See segment_attention.h.
#pragma once

#include "common/simd/math.h"
#include "segment_attention/segment_attention.h"

namespace appo {
namespace {

// A row's state (m, l) absorbs the scores of n keys, s[0 … n); what lies behind them up to 16 is
// ignored. Their weights 2^(s · scale2 - m) go to `weights`, zero from n to the next whole vector;
// `round`: as bf16, and it is the rounded ones that l sums. Returns by what the row's sums are to
// shrink.
template <class V, bool round>
float absorb(const float* s, int64_t n, float scale2, float* state, float* weights) {
  const int64_t whole = n - n % V::lanes;
  auto top = V::set(kEmpty);
  for (int64_t j = 0; j < whole; j += V::lanes) top = V::max(V::load(s + j), top);  // passes NaN by
  if (whole < n) top = V::max(V::keep(V::load(s + whole), n - whole, top), top);
  const float largest = V::largest(top) * scale2, before = state[0];
  float shrink = 1.0f;
  if (largest > before) {
    shrink = V::largest(exp2_low<V>(V::set(before - largest)));
    state[0] = largest;
  }
  // The product is rounded before m is taken off, as m itself was: the largest score weighs exactly
  // 1, however large.
  const auto scale = V::set(scale2), m = V::set(state[0]), zero = V::set(0.0f);
  auto sum = zero;
  for (int64_t j = 0; j < n; j += V::lanes) {
    auto weight = exp2_low<V>(V::sub(V::mul(V::load(s + j), scale), m));
    if (j >= whole) weight = V::keep(weight, n - whole, zero);
    if constexpr (round) {
      uint16_t* to = reinterpret_cast<uint16_t*>(weights) + j;
      V::store_bf16(to, weight);
      weight = V::widen(reinterpret_cast<const char*>(to), Dtype::bf16);
    } else {
      V::store(weights + j, weight);
    }
    sum = V::add(sum, weight);
  }
  state[1] = state[1] * shrink + V::sum(sum);
  return shrink;
}

}  // namespace
}  // namespace appo

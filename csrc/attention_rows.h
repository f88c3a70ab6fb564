// The softmax step of attention over a vector type V. `bf16`: the weights are rounded to what the product takes.
#pragma once

#include "attention.h"
#include "linear_math.h"

namespace appo {
namespace {

// 2^x for x from minus infinity up: below -200 it is 0 anyway, and exp2 wants a finite number. NaN stays.
template <class V>
typename V::F exp2_low(typename V::F x) {
  return exp2<V>(V::max(V::set(-200.0f), x));
}

template <class V, bool bf16>
void absorb(const float* s, int64_t n, float scale2, float* state, float* o, int64_t dim, void* p) {
  const int64_t whole = n - n % V::lanes;
  auto top = V::set(kEmpty);
  for (int64_t j = 0; j < whole; j += V::lanes) top = V::max(V::load(s + j), top);  // passes NaN by
  if (whole < n) top = V::max(V::keep(V::load(s + whole), n - whole, top), top);
  const float largest = V::largest(top) * scale2, before = state[0];
  if (largest > before) {  // what was summed so far shrinks by 2^(old m - new m)
    const auto shrink = exp2_low<V>(V::set(before - largest));
    for (int64_t j = 0; j < dim; j += V::lanes) V::store(o + j, V::mul(V::load(o + j), shrink));
    state[0] = largest;
    state[1] *= V::largest(shrink);
  }
  const auto scale = V::set(scale2), down = V::set(-state[0]), zero = V::set(0.0f);
  auto sum = zero;
  for (int64_t j = 0; j < n; j += V::lanes) {
    auto weight = exp2_low<V>(V::fma(V::load(s + j), scale, down));
    if (j >= whole) weight = V::keep(weight, n - whole, zero);
    if constexpr (bf16) {
      uint16_t* to = static_cast<uint16_t*>(p) + j;
      V::store_bf16(to, weight);
      weight = V::widen(reinterpret_cast<const char*>(to), Dtype::bf16);  // weights sum to 1 as they are used
    } else {
      V::store(static_cast<float*>(p) + j, weight);
    }
    sum = V::add(sum, weight);
  }
  state[1] += V::sum(sum);
}

template <class V, bool bf16>
constexpr AttentionKernels attention_kernels() {
  return {absorb<V, bf16>};
}

}  // namespace
}  // namespace appo

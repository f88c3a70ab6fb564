// The softmax of tree attention and its gradient, row by row, over a vector type V. `bf16`: weights
// are rounded to what the product takes. See tree_attention.h.
#pragma once

#include <cstring>

#include "common/simd/math.h"
#include "tree_attention/tree_attention.h"

namespace appo {
namespace {

constexpr float kUnseen = -0.5f;  // below it: not seen

template <class V>
void see(const float* ends, const float* hurt, int64_t first, int64_t n, int64_t query,
         float* seen) {
  const auto at = V::set(static_cast<float>(query)), no = V::set(-1.0f);
  const int64_t before = query - first + 1;  // keys up to the query itself
  for (int64_t j = 0; j < n; j += V::lanes) {
    auto v = V::where_less(at, V::load(ends + j), V::load(hurt + j), no);
    if (j + V::lanes > before) v = j < before ? V::keep(v, before - j, no) : no;
    V::store(seen + j, v);
  }
}

template <class V, bool bf16, bool masked>
void absorb_some(const float* s, const float* seen, int64_t n, float scale2, float* state, float* o,
                 int64_t dim, void* p) {
  const auto scale = V::set(scale2), empty = V::set(kEmpty), low = V::set(kUnseen),
             zero = V::set(0.0f);
  const auto exponent = [&](int64_t j) {
    if (!masked) return V::mul(V::load(s + j), scale);
    const auto mark = V::load(seen + j);
    return V::where_less(mark, low, empty, V::fma(V::load(s + j), scale, mark));
  };
  auto top = empty;
  for (int64_t j = 0; j < n; j += V::lanes) top = V::max(exponent(j), top);  // passes NaN by
  const float largest = V::largest(top), before = state[0];
  if (largest > before) {  // what was summed so far shrinks by 2^(old m - new m)
    const auto shrink = exp2_low<V>(V::set(before - largest));
    for (int64_t d = 0; d < dim; d += V::lanes) V::store(o + d, V::mul(V::load(o + d), shrink));
    state[0] = largest;
    state[1] *= V::largest(shrink);
  }
  const auto m = V::set(state[0]);
  auto sum = zero;
  for (int64_t j = 0; j < n; j += V::lanes) {
    auto weight = exp2_low<V>(V::sub(exponent(j), m));
    if (masked) weight = V::where_less(V::load(seen + j), low, zero, weight);
    if constexpr (bf16) {
      V::store_bf16(static_cast<uint16_t*>(p) + j,
                    weight);  // summed as it was: backward needs lse with all its bits
    } else {
      V::store(static_cast<float*>(p) + j, weight);
    }
    sum = V::add(sum, weight);
  }
  state[1] += V::sum(sum);
}

template <class V, bool bf16>
void absorb(const float* s, const float* seen, int64_t n, float scale2, float* state, float* o,
            int64_t dim, void* p) {
  (seen ? absorb_some<V, bf16, true> : absorb_some<V, bf16, false>)(s, seen, n, scale2, state, o,
                                                                    dim, p);
}

template <class V, bool masked>
void slope_some(float* s, float* dp, const float* seen, int64_t n, float scale2, float lse2,
                float delta) {
  const auto scale = V::set(scale2), down = V::set(-lse2), shift = V::set(delta);
  const auto low = V::set(kUnseen), zero = V::set(0.0f);
  for (int64_t j = 0; j < n; j += V::lanes) {
    auto p = exp2_low<V>(V::fma(V::load(s + j), scale, down));
    auto ds = V::mul(p, V::sub(V::load(dp + j), shift));
    if (masked) {
      const auto mark = V::load(seen + j);
      p = V::where_less(mark, low, zero, p);
      ds = V::where_less(mark, low, zero, ds);
    }
    V::store(s + j, p);
    V::store(dp + j, ds);
  }
}

template <class V>
void slope(float* s, float* dp, const float* seen, int64_t n, float scale2, float lse2,
           float delta) {
  (seen ? slope_some<V, true> : slope_some<V, false>)(s, dp, seen, n, scale2, lse2, delta);
}

template <class V>
float dot(const char* a, const char* b, Dtype dtype, int64_t n) {
  const int64_t size = bytes_of(dtype);
  auto sum = V::set(0.0f);
  for (int64_t j = 0; j < n; j += V::lanes) {
    if (j + V::lanes <= n) {
      sum = V::fma(V::widen(a + j * size, dtype), V::widen(b + j * size, dtype), sum);
    } else {
      alignas(64) char few[2][V::lanes * 4] = {};
      std::memcpy(few[0], a + j * size, static_cast<size_t>((n - j) * size));
      std::memcpy(few[1], b + j * size, static_cast<size_t>((n - j) * size));
      sum = V::fma(V::widen(few[0], dtype), V::widen(few[1], dtype), sum);
    }
  }
  return V::sum(sum);
}

template <class V, bool bf16>
constexpr TreeKernels tree_kernels() {
  return {see<V>, absorb<V, bf16>, slope<V>, dot<V>};
}

}  // namespace
}  // namespace appo

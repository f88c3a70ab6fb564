// What happens to a row of logits: cap, statistics, gradient, over a vector type V. See kernels.h.
#pragma once

#include "common/simd/math.h"
#include "common/simd/rows.h"
#include "linear_logprob/linear_logprob.h"

namespace appo {
namespace {

template <class V>
void cap(float* x, int64_t n, float softcap) {
  const auto c = V::set(softcap);
  for (int64_t j = 0; j < n; j += V::lanes)
    V::store(x + j, V::mul(c, tanh<V>(V::div(V::load(x + j), c))));
}

template <class V>
void stats(const float* x, int64_t n, float scale2, float* state, char* record) {
  const auto factor = V::set(scale2), low = V::set(kEmpty), zero = V::set(0.0f);
  const auto raise = V::set(0x1p15f);  // 2^kCacheRaise
  auto top = low;
  for_vectors<V>(n, [&](int64_t j, int64_t count) {
    auto y = V::mul(V::load(x + j), factor);
    if (count < V::lanes) y = V::keep(y, count, low);
    top = V::max(y, top);  // returns the second operand if one is NaN: NaN reaches s, not m
  });
  const auto before = V::load(state);
  const auto m = V::max(top, before);
  const auto shift = V::sub(before, m), weight = exp2<V>(shift);
  const auto s0 = V::load(state + V::lanes), u0 = V::load(state + 2 * V::lanes);
  auto s = V::mul(weight, s0), u = V::mul(weight, V::fma(shift, s0, u0));
  for_vectors<V>(n, [&](int64_t j, int64_t count) {
    const auto y =
        V::sub(V::max(low, V::mul(V::load(x + j), factor)), m);  // -inf becomes kEmpty, NaN stays
    auto e = exp2<V>(y);
    if (count < V::lanes) e = V::keep(e, count, zero);
    if (record) V::store_f16(reinterpret_cast<uint16_t*>(record) + j, V::mul(e, raise));
    s = V::add(s, e);
    u = V::fma(e, count < V::lanes ? V::keep(y, count, zero) : y, u);
  });
  if (record) V::store(reinterpret_cast<float*>(record + kTile * 2), m);
  V::store(state, m);
  V::store(state + V::lanes, s);
  V::store(state + 2 * V::lanes, u);
}

template <class V>
void collapse(const float* state, float* out) {
  const auto m = V::load(state), s = V::load(state + V::lanes), u = V::load(state + 2 * V::lanes);
  const float top = V::largest(m);
  const auto shift = V::sub(m, V::set(top)), weight = exp2<V>(shift);
  out[0] = top;
  out[1] = V::sum(V::mul(weight, s));
  out[2] = V::sum(V::mul(weight, V::fma(shift, s, u)));
}

template <class V>
float grad(const float* x, float* g, int64_t n, const GradRow& row, bool add) {
  const auto factor = V::set(row.scale2), low = V::set(kEmpty), zero = V::set(0.0f);
  const auto m = V::set(row.m), log2s = V::set(row.log2s);
  const auto p_factor = V::set(row.p_factor), plogp_factor = V::set(row.plogp_factor);
  auto dot = zero;
  for_vectors<V>(n, [&](int64_t j, int64_t count) {
    const auto y = V::max(low, V::mul(V::load(x + j), factor));
    auto log2p = V::sub(V::sub(y, m), log2s);
    auto v = V::mul(exp2<V>(log2p), V::fnma(plogp_factor, log2p, p_factor));
    if (count < V::lanes) {
      v = V::keep(v, count, zero);
      log2p = V::keep(log2p, count, zero);
    }
    dot = V::fma(v, log2p, dot);
    V::store(g + j, add ? V::add(V::load(g + j), v) : v);
  });
  return V::sum(dot);
}

template <class V>
float grad_cached(const char* record, float* g, int64_t n, const GradRow& row, bool add) {
  const auto zero = V::set(0.0f), tiny = V::set(0x1p-30f), raised = V::set(kCacheRaise);
  const auto p_factor = V::set(row.p_factor), plogp_factor = V::set(row.plogp_factor);
  const auto m = V::load(reinterpret_cast<const float*>(record + kTile * 2));
  const auto shift = V::sub(V::sub(V::sub(m, V::set(row.m)), V::set(row.log2s)), raised),
             weight = exp2<V>(shift);
  auto dot = zero;
  for_vectors<V>(n, [&](int64_t j, int64_t count) {
    const auto e = V::widen(record + j * 2, Dtype::f16);
    const auto log2p = V::add(log2<V>(V::max(tiny, e)), shift);
    auto v = V::mul(V::mul(e, weight), V::fnma(plogp_factor, log2p, p_factor));
    if (count < V::lanes) v = V::keep(v, count, zero);
    dot = V::fma(v, log2p, dot);
    V::store(g + j, add ? V::add(V::load(g + j), v) : v);
  });
  return V::sum(dot);
}

template <class V>
void slope(const float* capped, float* g, int64_t n, float softcap) {
  const auto c = V::set(softcap);
  for (int64_t j = 0; j < n; j += V::lanes) {
    const auto t = V::div(V::load(capped + j), c), v = V::load(g + j);
    V::store(g + j, V::mul(v, V::fnma(t, t, V::set(1.0f))));
  }
}

}  // namespace
}  // namespace appo

// exp2, log2 and tanh over a vector type V. See kernels.h.
#pragma once

#include "common/matrix.h"

namespace appo {
namespace {

// 2^x to 1 ulp for x in -1e30 … 120; NaN stays. Minimax polynomial on [-½, ½], relative error 2e-9.
template <class V>
typename V::F exp2(typename V::F x) {
  const auto n = V::round(x);
  const auto f = V::sub(x, n);
  auto p = V::set(1.534581e-4f);
  p = V::fma(p, f, V::set(1.3399931e-3f));
  p = V::fma(p, f, V::set(9.618489e-3f));
  p = V::fma(p, f, V::set(5.5503286e-2f));
  p = V::fma(p, f, V::set(2.4022646e-1f));
  p = V::fma(p, f, V::set(6.931472e-1f));
  p = V::fma(p, f, V::set(1.0f));
  return V::scale(p, n);
}

// 2^x for x from minus infinity up: below -200 it is 0 anyway, and exp2 wants a finite number. NaN
// stays.
template <class V>
typename V::F exp2_low(typename V::F x) {
  return exp2<V>(V::max(V::set(-200.0f), x));
}

// log2 x to 3e-6 for positive normal x: enough for numbers kept with 11 bits.
template <class V>
typename V::F log2(typename V::F x) {
  const auto f = V::sub(V::mantissa(x), V::set(1.0f));
  auto p = V::set(-0.0264574f);
  p = V::fma(p, f, V::set(0.12345134f));
  p = V::fma(p, f, V::set(-0.27953798f));
  p = V::fma(p, f, V::set(0.45827073f));
  p = V::fma(p, f, V::set(-0.7182819f));
  p = V::fma(p, f, V::set(1.4425532f));
  return V::fma(p, f, V::exponent(x));
}

// tanh to 3 ulp: odd polynomial near 0, where 1 - 2 / (e^2y + 1) would cancel.
template <class V>
typename V::F tanh(typename V::F y) {
  const auto a = V::min(V::set(20.0f), V::abs(y));  // NaN stays
  const auto q = V::mul(y, y);
  auto p = V::set(-5.9058676e-3f);
  p = V::fma(p, q, V::set(2.0805383e-2f));
  p = V::fma(p, q, V::set(-5.3786684e-2f));
  p = V::fma(p, q, V::set(1.3331959e-1f));
  p = V::fma(p, q, V::set(-3.33333e-1f));
  const auto near = V::fma(V::mul(p, q), y, y);
  const auto one = V::set(1.0f);
  const auto e = exp2<V>(V::mul(a, V::set(2.0f * kLog2e)));
  const auto far = V::with_sign_of(V::sub(one, V::div(V::set(2.0f), V::add(e, one))), y);
  return V::where_less(a, V::set(0.6f), near, far);
}

}  // namespace
}  // namespace appo

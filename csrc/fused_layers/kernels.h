// Rows of RMSNorm, rotary positions and SwiGLU over a vector type V (common/simd). See
// fused_layers.h.
//
// A row is widened into scratch first and narrowed from there: both stay in L1, and no loop has to
// care for its end.
#pragma once

#include <cstring>

#include "common/simd/math.h"
#include "common/simd/rows.h"
#include "fused_layers/fused_layers.h"

namespace appo {
namespace {

// out[0 … fused_width(n)): the numbers as floats, zero beyond n.
template <class V>
void widen_row(const char* x, int64_t n, Dtype dtype, float* out) {
  const int64_t size = bytes_of(dtype);
  for_vectors<V>(n, [&](int64_t j, int64_t count) {
    if (count == V::lanes) {
      V::store(out + j, V::widen(x + j * size, dtype));
      return;
    }
    alignas(64) char few[V::lanes * 4] = {};
    std::memcpy(few, x + j * size, static_cast<size_t>(count * size));
    V::store(out + j, V::widen(few, dtype));
  });
  for (int64_t j = (n + V::lanes - 1) / V::lanes * V::lanes; j < fused_width(n); ++j) out[j] = 0.0f;
}

template <class V>
float fused_norm(const char* x, const float* weight, int64_t n, float eps, Dtype dtype, char* y,
                 float* a) {
  widen_row<V>(x, n, dtype, a);
  auto sum = V::set(0.0f);
  for (int64_t j = 0; j < n; j += V::lanes) sum = V::fma(V::load(a + j), V::load(a + j), sum);
  const float factor = 1.0f / __builtin_sqrtf(V::sum(sum) / static_cast<float>(n) + eps);
  const auto by = V::set(factor);
  for (int64_t j = 0; j < n; j += V::lanes) {
    V::store(a + j, V::mul(V::mul(V::load(a + j), by), V::load(weight + j)));
  }
  emit<V>(a, n, dtype, y);
  return factor;
}

// With h = x · factor: dweight += dy h, dx = factor (dy weight - h mean(dy weight h)).
template <class V>
void fused_norm_grad(const char* x, const float* weight, float factor, const char* dy, int64_t n,
                     Dtype dtype, char* dx, float* dweight, float* a) {
  float* g = a + fused_width(n);
  widen_row<V>(x, n, dtype, a);
  widen_row<V>(dy, n, dtype, g);
  const auto by = V::set(factor);
  auto dot = V::set(0.0f);
  for (int64_t j = 0; j < n; j += V::lanes) {
    const auto h = V::mul(V::load(a + j), by), d = V::load(g + j);
    if (dweight) V::store(dweight + j, V::fma(d, h, V::load(dweight + j)));
    const auto dh = V::mul(d, V::load(weight + j));
    dot = V::fma(dh, h, dot);
    V::store(a + j, h);
    V::store(g + j, dh);
  }
  if (!dx) return;
  const auto mean = V::set(V::sum(dot) / static_cast<float>(n));
  for (int64_t j = 0; j < n; j += V::lanes) {
    V::store(a + j, V::mul(by, V::fnma(mean, V::load(a + j), V::load(g + j))));
  }
  emit<V>(a, n, dtype, dx);
}

// NaN passes both bounds (the second operand is returned); beyond them 1 + 2^y is 1 or so large
// that x / it is 0.
template <class V>
typename V::F sigmoid(typename V::F x) {
  const auto y = V::min(V::set(126.0f), V::max(V::set(-126.0f), V::mul(x, V::set(-kLog2e))));
  return V::div(V::set(1.0f), V::add(V::set(1.0f), exp2<V>(y)));
}

template <class V>
void fused_swiglu(const char* gate, const char* up, int64_t n, Dtype dtype, char* out, float* g) {
  float* u = g + fused_width(n);
  widen_row<V>(gate, n, dtype, g);
  widen_row<V>(up, n, dtype, u);
  for (int64_t j = 0; j < n; j += V::lanes) {
    const auto x = V::load(g + j);
    V::store(g + j, V::mul(V::mul(x, sigmoid<V>(x)), V::load(u + j)));
  }
  emit<V>(g, n, dtype, out);
}

template <class V>
void fused_swiglu_grad(const char* gate, const char* up, const char* d_out, int64_t n, Dtype dtype,
                       char* d_gate, char* d_up, float* g) {
  float *u = g + fused_width(n), *d = u + fused_width(n);
  widen_row<V>(gate, n, dtype, g);
  widen_row<V>(up, n, dtype, u);
  widen_row<V>(d_out, n, dtype, d);
  for (int64_t j = 0; j < n; j += V::lanes) {
    const auto x = V::load(g + j), s = sigmoid<V>(x), silu = V::mul(x, s), dy = V::load(d + j);
    const auto slope = V::fma(s, V::sub(V::set(1.0f), silu), silu);  // of silu: s + silu (1 - s)
    V::store(g + j, V::mul(V::mul(dy, V::load(u + j)), slope));
    V::store(d + j, V::mul(dy, silu));
  }
  emit<V>(g, n, dtype, d_gate);
  emit<V>(d, n, dtype, d_up);
}

template <class V>
void fused_rotate(const char* x, const float* cos, const float* sin, int64_t n, Dtype dtype,
                  char* out, float* a) {
  float* b = a + fused_width(n);
  const int64_t half = n * bytes_of(dtype);
  widen_row<V>(x, n, dtype, a);
  widen_row<V>(x + half, n, dtype, b);
  for (int64_t j = 0; j < n; j += V::lanes) {
    const auto u = V::load(a + j), v = V::load(b + j), c = V::load(cos + j), s = V::load(sin + j);
    V::store(a + j, V::fnma(v, s, V::mul(u, c)));
    V::store(b + j, V::fma(u, s, V::mul(v, c)));
  }
  emit<V>(a, n, dtype, out);
  emit<V>(b, n, dtype, out + half);
}

template <class V>
constexpr FusedKernels fused_kernels() {
  return {widen_row<V>,    fused_norm<V>,        fused_norm_grad<V>,
          fused_swiglu<V>, fused_swiglu_grad<V>, fused_rotate<V>};
}

}  // namespace
}  // namespace appo

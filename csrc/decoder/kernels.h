// What happens to a row in a decoder layer, over a vector type V (see common/simd/avx2.h) with a
// few operations more: round_number (to the model's dtype and back), store_number, and for
// neighbouring pairs (a, b) evens = (a, a), odds = (b, b), swapped = (b, a).
#pragma once

#include <cstring>

#include "common/simd/math.h"
#include "common/simd/product.h"
#include "common/simd/rows.h"
#include "decoder/product.h"

namespace appo {
namespace {

// Stores n floats as numbers; `out` has room for n only.
template <class V>
void emit_numbers(const float* y, int64_t n, void* out) {
  emit<V>(y, n, V::number, out);
}

template <class V>
float rms_factor(const float* x, int64_t n, float eps) {
  auto sum = V::set(0.0f);
  for_vectors<V>(n, [&](int64_t j, int64_t count) {
    auto v = V::set(0.0f);
    if (count == V::lanes) {
      v = V::load(x + j);
    } else {
      alignas(64) float few[V::lanes] = {};
      std::memcpy(few, x + j, static_cast<size_t>(count) * 4);
      v = V::load(few);
    }
    sum = V::fma(v, v, sum);
  });
  return 1.0f / __builtin_sqrtf(V::sum(sum) / static_cast<float>(n) + eps);
}

template <class V, Dtype dtype>
void norm(const float* x, const float* weight, int64_t n, float eps, int64_t width, void* out) {
  const float factor = rms_factor<V>(x, n, eps);
  const auto by = V::set(factor);
  char* to = static_cast<char*>(out);
  const int64_t size = bytes_of(dtype);
  for_vectors<V>(n, [&](int64_t j, int64_t count) {
    if (count == V::lanes) {
      const auto v = V::mul(V::mul(V::load(x + j), by), V::load(weight + j));
      if constexpr (dtype == V::number) {
        V::store_number(to + j * size, v);
      } else {
        V::store(reinterpret_cast<float*>(to) + j, v);
      }
      return;
    }
    alignas(64) float few[V::lanes];
    for (int64_t l = 0; l < count; ++l) few[l] = x[j + l] * factor * weight[j + l];
    emit<V>(few, count, dtype, to + j * size);
  });
  std::memset(to + n * size, 0, static_cast<size_t>((width - n) * size));
}

template <class V>
void widen(const char* numbers, int64_t n, float* out) {
  const int64_t size = bytes_of(V::number);
  for_vectors<V>(n, [&](int64_t j, int64_t count) {
    if (count == V::lanes) {
      V::store(out + j, V::widen(numbers + j * size, V::number));
      return;
    }
    alignas(64) char few[V::lanes * 4] = {};
    alignas(64) float wide[V::lanes];
    std::memcpy(few, numbers + j * size, static_cast<size_t>(count * size));
    V::store(wide, V::widen(few, V::number));
    std::memcpy(out + j, wide, static_cast<size_t>(count) * 4);
  });
}

// y, bias and more have room for the last vector.
template <class V>
void finish(float* y, const float* bias, const float* more, int64_t n) {
  for (int64_t j = 0; j < n; j += V::lanes) {
    auto v = V::load(y + j);
    if (bias) v = V::add(v, V::load(bias + j));
    v = V::round_number(v);
    if (more) v = V::round_number(V::add(v, V::load(more + j)));
    V::store(y + j, v);
  }
}

template <class V>
void add(float* x, const float* y, int64_t n) {
  int64_t j = 0;
  for (; j + V::lanes <= n; j += V::lanes) V::store(x + j, V::add(V::load(x + j), V::load(y + j)));
  for (; j < n; ++j) x[j] += y[j];
}

template <class V>
void turn(float* y, int64_t dim, const float* weight, float eps, const float* by, void* out) {
  if (weight) {
    const float factor = rms_factor<V>(y, dim, eps);
    for (int64_t j = 0; j < dim; ++j) y[j] = y[j] * factor * weight[j];
  }
  int64_t j = 0;
  for (; j + V::lanes <= dim; j += V::lanes) {
    const auto v = V::load(y + j), c = V::load(by + j);  // (re, im) pairs of both
    const auto along = V::mul(v, V::evens(c)), across = V::mul(V::swapped(v), V::odds(c));
    V::store(y + j, V::subtract_add(along, across));
  }
  for (; j < dim; j += 2) {
    const float re = y[j] * by[j] - y[j + 1] * by[j + 1], im = y[j + 1] * by[j] + y[j] * by[j + 1];
    y[j] = re;
    y[j + 1] = im;
  }
  emit_numbers<V>(y, dim, out);
}

// g and u have room for the last vector.
template <class V>
void gate(float* g, const float* u, int64_t n, void* out) {
  const auto one = V::set(1.0f), high = V::set(126.0f), low = V::set(-126.0f),
             factor = V::set(-kLog2e);
  for (int64_t j = 0; j < n; j += V::lanes) {
    const auto v = V::load(g + j);
    // NaN passes both bounds (the second operand is returned); beyond them 1 + 2^y is 1 or so large
    // that v / it is 0.
    const auto y = V::min(high, V::max(low, V::mul(v, factor)));
    const auto silu = V::round_number(V::div(v, V::add(one, exp2<V>(y))));
    V::store(g + j, V::mul(silu, V::load(u + j)));
  }
  emit_numbers<V>(g, n, out);
}

template <class V>
constexpr LayerKernels layer_kernels(const MatrixKernels& linear) {
  LayerKernels k{&linear,
                 V::number,
                 widen<V>,
                 norm<V, V::number>,
                 norm<V, Dtype::f32>,
                 finish<V>,
                 add<V>,
                 turn<V>,
                 gate<V>,
                 stream<V, Whole<V>>,
                 nullptr};
  if constexpr (V::number == Dtype::bf16) k.product_of_floats = stream<V, Halves<V>>;
  return k;
}

}  // namespace
}  // namespace appo

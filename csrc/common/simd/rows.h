// Rows of floats: a loop over whole vectors and the rest, and rounding to numbers, over a vector
// type V.
#pragma once

#include <cstring>

#include "common/matrix.h"

namespace appo {
namespace {

// Calls body(j, count) for whole vectors and, with count < lanes, for the rest of n columns.
template <class V, class Body>
inline __attribute__((always_inline)) void for_vectors(int64_t n, const Body& body) {
  int64_t j = 0;
  for (; j + V::lanes <= n; j += V::lanes) body(j, V::lanes);
  if (j < n) body(j, n - j);
}

template <class V, class Dot>
void store(const float* g0, const float* g1, int64_t n, void* row0, void* row1, float* pairs) {
  for (int64_t j = 0; j < n; j += V::lanes) {
    if constexpr (Dot::pair == 2) {
      uint16_t* to0 = static_cast<uint16_t*>(row0) + j;
      uint16_t* to1 = static_cast<uint16_t*>(row1) + j;
      V::store_bf16(to0, V::load(g0 + j));
      V::store_bf16(to1, V::load(g1 + j));
      if (pairs) V::store(pairs + j, V::words(to0, to1));
    } else {
      V::store(static_cast<float*>(row0) + j, V::load(g0 + j));
      V::store(static_cast<float*>(row1) + j, V::load(g1 + j));
    }
  }
}

template <class V>
void emit(const float* c, int64_t n, Dtype dtype, void* out) {
  for_vectors<V>(n, [&](int64_t j, int64_t count) {
    const auto v = V::load(c + j);
    alignas(64) char few[V::lanes * 4];
    char* to = static_cast<char*>(out) + j * bytes_of(dtype);
    char* at = count < V::lanes ? few : to;
    if (dtype == Dtype::f32) V::store(reinterpret_cast<float*>(at), v);
    if (dtype == Dtype::bf16) V::store_bf16(reinterpret_cast<uint16_t*>(at), v);
    if (dtype == Dtype::f16) V::store_f16(reinterpret_cast<uint16_t*>(at), v);
    if (count < V::lanes) std::memcpy(to, few, count * bytes_of(dtype));
  });
}

}  // namespace
}  // namespace appo

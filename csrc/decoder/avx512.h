// Pairs of floats in AVX-512 vectors, for the rotation. See kernels.h.
#pragma once

#include "common/simd/avx512.h"
#include "decoder/kernels.h"

namespace appo {
namespace {

template <class Base>
struct Avx512Pairs : Base {
  using F = __m512;
  static F evens(F a) { return _mm512_moveldup_ps(a); }
  static F odds(F a) { return _mm512_movehdup_ps(a); }
  static F swapped(F a) { return _mm512_permute_ps(a, 0xb1); }
  static F subtract_add(F a, F b) {  // a - b in even lanes, a + b in odd ones
    return _mm512_mask_sub_ps(_mm512_add_ps(a, b), 0x5555, a, b);
  }
};

}  // namespace
}  // namespace appo

// Sixteen floats, and words of two bf16 (AVX512-BF16): two multiplications per lane and
// instruction, summed in float32.
#pragma once

#include "common/simd/avx512.h"

namespace appo {
namespace {

struct Avx512Bf16 : Avx512 {
  static void store_bf16(uint16_t* p, F v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(v));
  }
};

struct Bf16Dot {
  using Number = uint16_t;
  static constexpr int64_t pair = 2;
  static __m512 dot(__m512 c, __m512 a, __m512 b) {
    return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
  }
};

}  // namespace
}  // namespace appo

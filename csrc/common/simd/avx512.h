// Sixteen floats (AVX-512 F, BW, DQ, VL). See kernels.h for what each operation is used for.
#pragma once

#include <immintrin.h>

#include "common/matrix.h"

namespace appo {
namespace {

struct Avx512 {
  using F = __m512;
  static constexpr int64_t lanes = 16,
                           columns =
                               4;  // 6 x 4 sums, 4 right and 1 left factor: 29 of 32 registers

  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F v) { _mm512_storeu_ps(p, v); }
  static F set(float v) { return _mm512_set1_ps(v); }
  static F broadcast(const float* p) { return _mm512_set1_ps(*p); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F fnma(F a, F b, F c) { return _mm512_fnmadd_ps(a, b, c); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }  // b if either is NaN
  static F min(F a, F b) { return _mm512_min_ps(a, b); }  // b if either is NaN
  static F abs(F a) { return _mm512_abs_ps(a); }
  static F round(F a) {
    return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static F scale(F a, F n) { return _mm512_scalef_ps(a, n); }  // a · 2^n
  static F exponent(F a) { return _mm512_getexp_ps(a); }
  static F mantissa(F a) {
    return _mm512_getmant_ps(a, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src);
  }  // in [1, 2)
  static float sum(F a) { return _mm512_reduce_add_ps(a); }
  static float largest(F a) { return _mm512_reduce_max_ps(a); }
  static F keep(F a, int64_t count, F other) {
    return _mm512_mask_blend_ps(static_cast<__mmask16>((1u << count) - 1u), other, a);
  }
  static F where_less(F a, F b, F yes, F no) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
  }
  static F with_sign_of(F a, F b) {
    const F sign = _mm512_set1_ps(-0.0f);
    return _mm512_or_ps(_mm512_and_ps(sign, b), _mm512_andnot_ps(sign, a));
  }

  static F widen(const char* p, Dtype dtype) {
    if (dtype == Dtype::f32) return _mm512_loadu_ps(reinterpret_cast<const float*>(p));
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    if (dtype == Dtype::f16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  static void store_f16(uint16_t* p, F v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  static void store_bf16(uint16_t* p, F v) {  // nearest even; NaN keeps its upper bits, made quiet
    const __m512i bits = _mm512_castps_si512(v),
                  odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    up = _mm512_mask_or_epi32(up, nan, bits, _mm512_set1_epi32(0x400000));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16)));
  }
  // Words (low[j], high[j]) from two rows of bf16.
  static F words(const uint16_t* low, const uint16_t* high) {
    const __m512i a =
        _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(low)));
    const __m512i b =
        _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(high)));
    return _mm512_castsi512_ps(_mm512_or_si512(a, _mm512_slli_epi32(b, 16)));
  }

  // out[k·ld + i] = rows[i][from + k] for a block of 16 x 16 words.
  static void transpose(const float* const* rows, int64_t from, float* out, int64_t ld) {
    __m512 r[16], t[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) r[i] = load(rows[i] + from);
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
      t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
      t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
    const auto low = [](F a, F b) {
      return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
    };
    const auto high = [](F a, F b) {
      return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
    };
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
      r[i] = low(t[i], t[i + 2]);
      r[i + 1] = high(t[i], t[i + 2]);
      r[i + 2] = low(t[i + 1], t[i + 3]);
      r[i + 3] = high(t[i + 1], t[i + 3]);
    }
    // r[4a + b] holds column 4q + b of rows 4a … 4a+3 in quarter q; now gather equal quarters.
#pragma GCC unroll 4
    for (int b = 0; b < 4; ++b) {
      const F even_a = _mm512_shuffle_f32x4(r[b], r[4 + b], 0x88),
              odd_a = _mm512_shuffle_f32x4(r[b], r[4 + b], 0xdd);
      const F even_b = _mm512_shuffle_f32x4(r[8 + b], r[12 + b], 0x88),
              odd_b = _mm512_shuffle_f32x4(r[8 + b], r[12 + b], 0xdd);
      store(out + b * ld, _mm512_shuffle_f32x4(even_a, even_b, 0x88));
      store(out + (4 + b) * ld, _mm512_shuffle_f32x4(odd_a, odd_b, 0x88));
      store(out + (8 + b) * ld, _mm512_shuffle_f32x4(even_a, even_b, 0xdd));
      store(out + (12 + b) * ld, _mm512_shuffle_f32x4(odd_a, odd_b, 0xdd));
    }
  }
};

}  // namespace
}  // namespace appo

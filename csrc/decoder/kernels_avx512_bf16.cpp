// Bfloat16 models with AVX512-BF16.

#include "common/simd/avx512_bf16.h"
#include "decoder/avx512.h"

namespace appo {
namespace {

struct Bfloats : Avx512Pairs<Avx512Bf16> {
  using Dot = Bf16Dot;
  static constexpr Dtype number = Dtype::bf16;
  static F round_number(F v) {
    const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(v);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16));
  }
  static void store_number(char* p, F v) { store_bf16(reinterpret_cast<uint16_t*>(p), v); }
  static F half_word(const float* p, int half) {
    const __m512i word = _mm512_loadu_si512(p);
    const __m512i upper =
        half ? _mm512_and_si512(word, _mm512_set1_epi32(-65536)) : _mm512_slli_epi32(word, 16);
    return _mm512_castsi512_ps(upper);
  }
};

}  // namespace

const LayerKernels& layer_avx512_bf16() {
  static const LayerKernels table = layer_kernels<Bfloats>(matrix_avx512_bf16());
  return table;
}

}  // namespace appo

// Attention with float products, for float32 and for bf16 where there are no bf16 products.

#include "common/simd/avx512.h"
#include "segment_attention/kernels.h"

namespace appo {
namespace {

struct Halved : Avx512 {
  static F low_float(const float* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16));
  }
  static F high_float(const float* p) {
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32(-65536)));
  }
};

}  // namespace

const AttentionKernels* attention_avx512(Dtype dtype) {
  static const AttentionKernels of_floats{&matrix_avx512(), meet<Avx512, Floats<Avx512>>};
  static const AttentionKernels of_bf16{&matrix_avx512(), meet<Halved, Halves<Halved>>};
  return dtype == Dtype::bf16 ? &of_bf16 : &of_floats;
}

}  // namespace appo

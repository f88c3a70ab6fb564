// Attention for machines without AVX-512.

#include "common/simd/avx2.h"
#include "segment_attention/kernels.h"

namespace appo {
namespace {

struct Halved : Avx2 {
  static F low_float(const float* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(load(p)), 16));
  }
  static F high_float(const float* p) {
    return _mm256_and_ps(load(p), _mm256_castsi256_ps(_mm256_set1_epi32(-65536)));
  }
};

}  // namespace

const AttentionKernels* attention_avx2(Dtype dtype) {
  static const AttentionKernels of_floats{&matrix_avx2(), meet<Avx2, Floats<Avx2>>};
  static const AttentionKernels of_bf16{&matrix_avx2(), meet<Halved, Halves<Halved>>};
  return dtype == Dtype::bf16 ? &of_bf16 : &of_floats;
}

}  // namespace appo

// Attention with bf16 products.

#include "common/simd/avx512_bf16.h"
#include "segment_attention/kernels.h"

namespace appo {
namespace {

struct Paired : Avx512Bf16 {
  static F low_word(const float* p) {
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32(0xffff)));
  }
};

}  // namespace

const AttentionKernels* attention_avx512_bf16(Dtype dtype) {
  static const AttentionKernels table{&matrix_avx512_bf16(), meet<Paired, Words<Paired, Bf16Dot>>};
  return dtype == Dtype::bf16 ? &table : nullptr;
}

}  // namespace appo

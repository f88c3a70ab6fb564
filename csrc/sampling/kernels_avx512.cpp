// Sixteen tokens at a time. See kernels.h.

#include "common/simd/avx512.h"
#include "sampling/kernels.h"

namespace appo {
namespace {

struct Sixteen : Avx512 {
  using I = __m512i;
  using Avx512::add;
  using Avx512::mul;
  static I ints(uint32_t v) { return _mm512_set1_epi32(static_cast<int>(v)); }
  static I ramp() {
    return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  }
  static I add(I a, I b) { return _mm512_add_epi32(a, b); }
  static I mul(I a, I b) { return _mm512_mullo_epi32(a, b); }
  static I flip(I a, I b) { return _mm512_xor_si512(a, b); }
  template <int n>
  static I shift(I a) {
    return _mm512_srli_epi32(a, n);
  }
  static F upper(I a) { return _mm512_cvtepi32_ps(_mm512_srli_epi32(a, 8)); }
  static uint32_t mask_not_above(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
  static void store_ints(uint32_t* p, I a) { _mm512_storeu_si512(p, a); }
};

}  // namespace

const SampleKernels& sample_avx512() {
  static const SampleKernels table = sample_kernels<Sixteen>();
  return table;
}

}  // namespace appo

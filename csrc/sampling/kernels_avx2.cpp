// Eight tokens at a time. See kernels.h.

#include "common/simd/avx2.h"
#include "sampling/kernels.h"

namespace appo {
namespace {

struct Eight : Avx2 {
  using I = __m256i;
  using Avx2::add;
  using Avx2::mul;
  static I ints(uint32_t v) { return _mm256_set1_epi32(static_cast<int>(v)); }
  static I ramp() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
  static I add(I a, I b) { return _mm256_add_epi32(a, b); }
  static I mul(I a, I b) { return _mm256_mullo_epi32(a, b); }
  static I flip(I a, I b) { return _mm256_xor_si256(a, b); }
  template <int n>
  static I shift(I a) {
    return _mm256_srli_epi32(a, n);
  }
  static F upper(I a) { return _mm256_cvtepi32_ps(_mm256_srli_epi32(a, 8)); }
  static uint32_t mask_not_above(F a, F b) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_LE_OQ)));
  }
  static void store_ints(uint32_t* p, I a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a);
  }
};

}  // namespace

const SampleKernels& sample_avx2() {
  static const SampleKernels table = sample_kernels<Eight>();
  return table;
}

}  // namespace appo

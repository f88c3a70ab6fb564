// Float products for machines without AVX-512.

#include "common/simd/avx2.h"

namespace appo {

const LinearKernels& linear_avx2() {
  static constexpr LinearKernels table = kernels<Avx2, FloatDot<Avx2>>();
  return table;
}

}  // namespace appo

// Float products for machines without AVX-512.

#include "common/simd/avx2.h"
#include "common/simd/kernels.h"

namespace appo {

const MatrixKernels& matrix_avx2() {
  static constexpr MatrixKernels table = matrix_kernels<Avx2, FloatDot<Avx2>>();
  return table;
}

}  // namespace appo

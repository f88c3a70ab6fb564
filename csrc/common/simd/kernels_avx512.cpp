// Float products with AVX-512.

#include "common/simd/avx512.h"
#include "common/simd/kernels.h"

namespace appo {

const MatrixKernels& matrix_avx512() {
  static constexpr MatrixKernels table = matrix_kernels<Avx512, FloatDot<Avx512>>();
  return table;
}

}  // namespace appo

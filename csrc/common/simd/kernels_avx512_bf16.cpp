// bf16 products with AVX512-BF16.

#include "common/simd/avx512_bf16.h"
#include "common/simd/kernels.h"

namespace appo {

const MatrixKernels& matrix_avx512_bf16() {
  static constexpr MatrixKernels table = matrix_kernels<Avx512Bf16, Bf16Dot>();
  return table;
}

}  // namespace appo

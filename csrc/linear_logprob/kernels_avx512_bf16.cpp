// bf16 products with AVX512-BF16.

#include "common/simd/avx512_bf16.h"

namespace appo {

const LinearKernels& linear_avx512_bf16() {
  static constexpr LinearKernels table = kernels<Avx512Bf16, Bf16Dot>();
  return table;
}

}  // namespace appo

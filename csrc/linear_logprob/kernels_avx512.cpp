// Float products with AVX-512, for float32 and widened 16-bit inputs.

#include "common/simd/avx512.h"

namespace appo {

const LinearKernels& linear_avx512() {
  static constexpr LinearKernels table = kernels<Avx512, FloatDot<Avx512>>();
  return table;
}

}  // namespace appo

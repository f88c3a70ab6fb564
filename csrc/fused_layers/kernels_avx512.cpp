// Sixteen numbers at a time. See kernels.h.

#include "common/simd/avx512.h"
#include "fused_layers/kernels.h"

namespace appo {

const FusedKernels& fused_avx512() {
  static constexpr FusedKernels table = fused_kernels<Avx512>();
  return table;
}

}  // namespace appo

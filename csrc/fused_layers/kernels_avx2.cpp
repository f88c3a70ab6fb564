// Eight numbers at a time. See kernels.h.

#include "common/simd/avx2.h"
#include "fused_layers/kernels.h"

namespace appo {

const FusedKernels& fused_avx2() {
  static constexpr FusedKernels table = fused_kernels<Avx2>();
  return table;
}

}  // namespace appo

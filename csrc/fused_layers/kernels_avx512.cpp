// Sixteen numbers at a time. See kernels.h.

#include "common/simd/avx512.h"
#include "fused_layers/kernels.h"

namespace appo {

const GlueKernels& glue_avx512() {
  static constexpr GlueKernels table = glue_kernels<Avx512>();
  return table;
}

}  // namespace appo

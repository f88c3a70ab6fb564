// Eight numbers at a time. See kernels.h.

#include "common/simd/avx2.h"
#include "fused_layers/kernels.h"

namespace appo {

const GlueKernels& glue_avx2() {
  static constexpr GlueKernels table = glue_kernels<Avx2>();
  return table;
}

}  // namespace appo

// Sixteen numbers at a time. See glue_kernels.h.

#include "glue_kernels.h"
#include "linear_avx512.h"

namespace appo {

const GlueKernels& glue_avx512() {
  static constexpr GlueKernels table = glue_kernels<Avx512>();
  return table;
}

}  // namespace appo

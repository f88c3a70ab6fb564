// Eight numbers at a time. See glue_kernels.h.

#include "glue_kernels.h"
#include "linear_avx2.h"

namespace appo {

const GlueKernels& glue_avx2() {
  static constexpr GlueKernels table = glue_kernels<Avx2>();
  return table;
}

}  // namespace appo

// Sixteen logits at a time. See kernels.h.

#include "common/simd/avx512.h"
#include "linear_logprob/kernels.h"

namespace appo {

const LinearKernels& linear_avx512() {
  static const LinearKernels table = linear_kernels<Avx512>(matrix_avx512());
  return table;
}

}  // namespace appo

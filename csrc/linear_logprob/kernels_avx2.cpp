// Eight logits at a time. See kernels.h.

#include "common/simd/avx2.h"
#include "linear_logprob/kernels.h"

namespace appo {

const LinearKernels& linear_avx2() {
  static const LinearKernels table = linear_kernels<Avx2>(matrix_avx2());
  return table;
}

}  // namespace appo

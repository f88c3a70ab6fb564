// Sixteen logits at a time, beside bf16 products. See kernels.h.

#include "common/simd/avx512_bf16.h"
#include "linear_logprob/kernels.h"

namespace appo {

const LinearKernels& linear_avx512_bf16() {
  static const LinearKernels table = linear_kernels<Avx512Bf16>(matrix_avx512_bf16());
  return table;
}

}  // namespace appo

// Attention with float products, for float32 and widened 16-bit inputs.

#include "attention_rows.h"
#include "linear_avx512.h"

namespace appo {

const AttentionKernels& attention_avx512() {
  static constexpr AttentionKernels table = attention_kernels<Avx512, false>();
  return table;
}

}  // namespace appo

// Attention with bf16 products.

#include "attention_rows.h"
#include "linear_avx512_bf16.h"

namespace appo {

const AttentionKernels& attention_avx512_bf16() {
  static constexpr AttentionKernels table = attention_kernels<Avx512Bf16, true>();
  return table;
}

}  // namespace appo

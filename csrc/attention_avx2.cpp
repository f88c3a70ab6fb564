// Attention for machines without AVX-512.

#include "attention_rows.h"
#include "linear_avx2.h"

namespace appo {

const AttentionKernels& attention_avx2() {
  static constexpr AttentionKernels table = attention_kernels<Avx2, false>();
  return table;
}

}  // namespace appo

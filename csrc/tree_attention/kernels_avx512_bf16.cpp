// Tree attention with bf16 products.

#include "common/simd/avx512_bf16.h"
#include "tree_attention/rows.h"

namespace appo {

const TreeKernels& tree_avx512_bf16() {
  static constexpr TreeKernels table = tree_kernels<Avx512Bf16, true>();
  return table;
}

}  // namespace appo

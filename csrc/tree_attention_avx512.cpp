// Tree attention with float products and AVX-512.

#include "linear_avx512.h"
#include "tree_attention_rows.h"

namespace appo {

const TreeKernels& tree_avx512() {
  static constexpr TreeKernels table = tree_kernels<Avx512, false>();
  return table;
}

}  // namespace appo

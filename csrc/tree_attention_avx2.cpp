// Tree attention for machines without AVX-512.

#include "linear_avx2.h"
#include "tree_attention_rows.h"

namespace appo {

const TreeKernels& tree_avx2() {
  static constexpr TreeKernels table = tree_kernels<Avx2, false>();
  return table;
}

}  // namespace appo

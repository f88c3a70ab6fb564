// Tree attention for machines without AVX-512.

#include "common/simd/avx2.h"
#include "tree_attention/rows.h"

namespace appo {

const TreeKernels& tree_avx2() {
  static constexpr TreeKernels table = tree_kernels<Avx2, false>();
  return table;
}

}  // namespace appo

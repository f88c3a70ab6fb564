// Tree attention with float products and AVX-512.

#include "common/simd/avx512.h"
#include "tree_attention/rows.h"

namespace appo {

const TreeKernels& tree_avx512() {
  static constexpr TreeKernels table = tree_kernels<Avx512, false>();
  return table;
}

}  // namespace appo

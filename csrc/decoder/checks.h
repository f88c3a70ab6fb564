// The choice of the instruction set for the layers and the head, and the sizes of a packed linear.
#pragma once

#include <tvm/ffi/error.h>
#include <tvm/ffi/string.h>

#include <string>

#include "common/checks.h"
#include "common/isa.h"
#include "common/tensors.h"
#include "decoder/packed.h"

namespace appo {

// "" is the best for the dtype. Bfloat16 needs AVX512-BF16: elsewhere PyTorch runs the layers.
inline const LayerKernels& kernels_for(const std::string& isa, bool bf16) {
  const bool any = isa.empty();
  if (bf16) {
    TVM_FFI_CHECK((any || isa == "avx512_bf16") && has_avx512_bf16(), ValueError)
        << "isa is '" << isa << "'; bfloat16 layers need avx512_bf16 and a machine that has it";
    return layer_avx512_bf16();
  }
  if ((any || isa == "avx512") && has_avx512()) return layer_avx512();
  TVM_FFI_CHECK((any || isa == "avx2") && has_avx2(), ValueError)
      << "isa is '" << isa << "'; float32 layers run with avx512 or avx2, on a machine that has it";
  return layer_avx2();
}

// A linear of these sizes, without memory.
inline Packed linear_of(const MatrixKernels& k, int64_t out, int64_t in, int64_t half = 0) {
  Packed p;
  p.k = &k;
  p.in = in;
  p.out = out;
  p.half = half;
  return p;
}

}  // namespace appo

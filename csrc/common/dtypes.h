// The number type of a tensor from Python, for kernels that take float32, bfloat16 and float16.
#pragma once

#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>

#include "common/matrix.h"

namespace appo {

inline Dtype dtype_of(const tvm::ffi::TensorView& t, const char* name) {
  const auto code = t.dtype().code;
  const auto bits = t.dtype().bits;
  if (code == kDLFloat && bits == 32) return Dtype::f32;
  if (code == kDLFloat && bits == 16) return Dtype::f16;
  TVM_FFI_CHECK(code == kDLBfloat && bits == 16, TypeError)
      << name << " must be float32, bfloat16 or float16";
  return Dtype::bf16;
}

}  // namespace appo

// Tensors of rows from Python: their data after the checks, for kernels that run in one of two
// dtypes.
#pragma once

#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/optional.h>

#include "common/matrix.h"

namespace appo {

namespace ffi = tvm::ffi;
using Tensor = ffi::TensorView;
using MaybeTensor = ffi::Optional<ffi::TensorView>;

inline void check_dtype(const Tensor& t, const char* name, Dtype dtype) {
  const bool right = dtype == Dtype::bf16 ? t.dtype().code == kDLBfloat && t.dtype().bits == 16
                                          : t.dtype().code == kDLFloat && t.dtype().bits == 32;
  TVM_FFI_CHECK(right && t.dtype().lanes == 1, TypeError)
      << name << " must be " << (dtype == Dtype::bf16 ? "bfloat16" : "float32");
}

// The data of a contiguous CPU tensor of rows · columns items, however its dimensions are split.
inline char* block(const Tensor& t, const char* name, Dtype dtype, int64_t rows, int64_t columns) {
  check_dtype(t, name, dtype);
  TVM_FFI_CHECK(t.device().device_type == kDLCPU && t.IsContiguous(), ValueError)
      << name << " must be contiguous and on the CPU";
  TVM_FFI_CHECK(
      t.ndim() >= 1 && t.numel() == rows * columns && (t.ndim() == 1 || t.size(0) == rows),
      ValueError)
      << name << " has " << t.numel() << " items, expected " << rows << " rows of " << columns;
  return static_cast<char*>(t.data_ptr());
}

inline const float* floats(const Tensor& t, const char* name, int64_t rows, int64_t columns) {
  return reinterpret_cast<const float*>(block(t, name, Dtype::f32, rows, columns));
}

inline Matrix weight(const Tensor& t, const char* name, Dtype dtype, int64_t out, int64_t in) {
  check_dtype(t, name, dtype);
  TVM_FFI_CHECK(
      t.device().device_type == kDLCPU && t.ndim() == 2 && t.size(0) == out && t.size(1) == in,
      ValueError)
      << name << " must be [" << out << ", " << in << "] on the CPU";
  return {static_cast<const char*>(t.data_ptr()), dtype, in, t.stride(0), t.stride(1), nullptr};
}

inline int64_t rows_of(const Tensor& x) {
  TVM_FFI_CHECK(x.ndim() == 2 && x.size(0) >= 1, ValueError)
      << "x must be [rows, hidden] with at least one row";
  return x.size(0);
}

}  // namespace appo

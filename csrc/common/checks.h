// Checks of what Python hands over; every message names the argument, what was found and what was
// expected.
#pragma once

#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>

#include <cstdint>

namespace appo {

// A contiguous CPU vector of `size` items of one dtype (DLPack code and bits).
inline void check_vector(const tvm::ffi::TensorView& t, const char* name, uint8_t code,
                         uint8_t bits, int64_t size) {
  TVM_FFI_CHECK(t.device().device_type == kDLCPU, ValueError) << name << " must be on the CPU";
  TVM_FFI_CHECK(t.ndim() == 1, ValueError) << name << " must have 1 dimension, has " << t.ndim();
  TVM_FFI_CHECK(t.dtype().code == code && t.dtype().bits == bits && t.dtype().lanes == 1, TypeError)
      << name << " has the wrong dtype (code " << int(t.dtype().code) << ", " << int(t.dtype().bits)
      << " bits)";
  TVM_FFI_CHECK(t.size(0) == size, ValueError)
      << name << " has " << t.size(0) << " items, expected " << size;
  TVM_FFI_CHECK(size < 2 || t.stride(0) == 1, ValueError) << name << " must be contiguous";
}

// A vector of float or double; returns its bits.
inline uint8_t check_floats(const tvm::ffi::TensorView& t, const char* name, int64_t size) {
  const uint8_t bits = t.dtype().bits;
  TVM_FFI_CHECK(bits == 32 || bits == 64, TypeError) << name << " must be float32 or float64";
  check_vector(t, name, kDLFloat, bits, size);
  return bits;
}

// offsets[segments + 1] from 0 to `tokens`, not decreasing; returns the data.
inline const int64_t* check_offsets(const tvm::ffi::TensorView& t, int64_t tokens) {
  TVM_FFI_CHECK(t.ndim() == 1 && t.size(0) >= 1, ValueError) << "offsets must be [B+1]";
  const int64_t segments = t.size(0) - 1;
  check_vector(t, "offsets", kDLInt, 64, segments + 1);
  const auto* offsets = static_cast<const int64_t*>(t.data_ptr());
  TVM_FFI_CHECK(offsets[0] == 0, ValueError) << "offsets[0] is " << offsets[0] << ", expected 0";
  for (int64_t b = 0; b < segments; ++b) {
    TVM_FFI_CHECK(offsets[b] <= offsets[b + 1], ValueError)
        << "offsets decrease at segment " << b << ": " << offsets[b] << " > " << offsets[b + 1];
  }
  TVM_FFI_CHECK(offsets[segments] == tokens, ValueError)
      << "offsets end at " << offsets[segments] << ", expected the number of tokens, " << tokens;
  return offsets;
}

inline void check_gamma(double gamma) {
  TVM_FFI_CHECK(gamma >= 0.0 && gamma <= 1.0, ValueError)
      << "gamma is " << gamma << ", expected 0 … 1";
}

template <typename T>
T* data(const tvm::ffi::TensorView& t) {
  return static_cast<T*>(t.data_ptr());
}

}  // namespace appo

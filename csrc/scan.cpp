// Segmented reverse discounted scan: out[i] = mask[i] * x[i] + gamma * out[i+1] inside each segment.
// O(N) time, no workspace. Twin of `future_value_torch` in kernels/branching.py; the two are tested against each other.

#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/function.h>

#include <algorithm>
#include <cstdint>

#include "threads.h"

namespace appo {
namespace {

namespace ffi = tvm::ffi;

// Below this many tokens per thread, starting a thread costs more than it saves.
constexpr int64_t kTokensPerThread = 1 << 16;

// The accumulator is double for float input too: it costs nothing in a latency-bound recurrence and removes the
// rounding drift that grows as 1 / (1 - gamma).
template <typename T>
void scan_segment(const T* x, const uint8_t* mask, T* out, int64_t begin, int64_t end, double gamma) {
  double sum = 0.0;
  for (int64_t i = end - 1; i >= begin; --i) {
    const double own = mask[i] ? static_cast<double>(x[i]) : 0.0;  // select, not multiply: NaN * 0 is NaN
    sum = gamma == 0.0 ? own : own + gamma * sum;
    out[i] = static_cast<T>(sum);
  }
}

template <typename T>
void scan(const T* x, const uint8_t* mask, T* out, const int64_t* offsets, int64_t segments,
          double gamma, int64_t threads) {
  const int64_t tokens = segments > 0 ? offsets[segments] : 0;
  const int64_t parts =
      std::clamp<int64_t>(std::min(tokens / kTokensPerThread, segments), 1, std::max<int64_t>(threads, 1));
  run_parts(parts, [&](int64_t part) {
    // A segment belongs to the part in which its first token lies: balanced by tokens, independent of timing.
    const int64_t low = tokens * part / parts;
    const int64_t high = part + 1 == parts ? tokens + 1 : tokens * (part + 1) / parts;
    const int64_t* first = std::lower_bound(offsets, offsets + segments, low);
    const int64_t* last = std::lower_bound(offsets, offsets + segments, high);
    for (const int64_t* o = first; o < last; ++o) scan_segment(x, mask, out, o[0], o[1], gamma);
  });
}

void check_vector(const ffi::TensorView& t, const char* name, uint8_t code, uint8_t bits, int64_t size) {
  TVM_FFI_CHECK(t.device().device_type == kDLCPU, ValueError) << name << " must be on the CPU";
  TVM_FFI_CHECK(t.ndim() == 1, ValueError) << name << " must have 1 dimension, has " << t.ndim();
  TVM_FFI_CHECK(t.dtype().code == code && t.dtype().bits == bits && t.dtype().lanes == 1, TypeError)
      << name << " has the wrong dtype (code " << int(t.dtype().code) << ", " << int(t.dtype().bits) << " bits)";
  TVM_FFI_CHECK(t.size(0) == size, ValueError) << name << " has " << t.size(0) << " items, expected " << size;
  TVM_FFI_CHECK(size < 2 || t.stride(0) == 1, ValueError) << name << " must be contiguous";
}

void check_offsets(const int64_t* offsets, int64_t segments, int64_t tokens) {
  TVM_FFI_CHECK(offsets[0] == 0, ValueError) << "offsets[0] is " << offsets[0] << ", expected 0";
  for (int64_t b = 0; b < segments; ++b) {
    TVM_FFI_CHECK(offsets[b] <= offsets[b + 1], ValueError)
        << "offsets decrease at segment " << b << ": " << offsets[b] << " > " << offsets[b + 1];
  }
  TVM_FFI_CHECK(offsets[segments] == tokens, ValueError)
      << "offsets end at " << offsets[segments] << ", expected the number of tokens, " << tokens;
}

void future_value(ffi::TensorView x, ffi::TensorView mask, ffi::TensorView offsets, double gamma,
                  ffi::TensorView out, int64_t threads) {
  TVM_FFI_CHECK(x.ndim() == 1 && offsets.ndim() == 1 && offsets.size(0) >= 1, ValueError)
      << "log_ratio must be [N] and offsets [B+1]";
  const int64_t tokens = x.size(0);
  const int64_t segments = offsets.size(0) - 1;
  const uint8_t bits = x.dtype().bits;
  TVM_FFI_CHECK(bits == 32 || bits == 64, TypeError) << "log_ratio must be float32 or float64";
  check_vector(x, "log_ratio", kDLFloat, bits, tokens);
  check_vector(out, "out", kDLFloat, bits, tokens);
  check_vector(mask, "mask", kDLUInt, 8, tokens);
  check_vector(offsets, "offsets", kDLInt, 64, segments + 1);
  TVM_FFI_CHECK(gamma >= 0.0 && gamma <= 1.0, ValueError) << "gamma is " << gamma << ", expected 0 … 1";

  const auto* o = static_cast<const int64_t*>(offsets.data_ptr());
  const auto* m = static_cast<const uint8_t*>(mask.data_ptr());
  check_offsets(o, segments, tokens);
  if (bits == 32) {
    scan(static_cast<const float*>(x.data_ptr()), m, static_cast<float*>(out.data_ptr()), o, segments, gamma, threads);
  } else {
    scan(static_cast<const double*>(x.data_ptr()), m, static_cast<double*>(out.data_ptr()), o, segments, gamma,
         threads);
  }
}

// Raised whenever a signature below changes; kernels/native.py refuses a library of another version.
int64_t abi_version() { return 1; }

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(future_value, future_value);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(abi_version, abi_version);

}  // namespace appo

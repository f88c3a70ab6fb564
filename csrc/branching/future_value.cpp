// Segmented reverse discounted scans: out[i] = mask[i] * x[i] + gamma * out[i+1] inside each
// segment, and the same along a tree of segments. O(N) time, no workspace per token. Twins of the
// definitions in kernels/branching/future_value.py; the two are tested against each other.

#include <tvm/ffi/function.h>

#include <vector>

#include "common/checks.h"
#include "common/segments.h"

namespace appo {
namespace {

namespace ffi = tvm::ffi;

// The accumulator is double for float input too: it costs nothing in a latency-bound recurrence and
// removes the rounding drift that grows as 1 / (1 - gamma). `sum` is what lies ahead of the last
// token; returns the value of the first.
template <typename T>
double scan_segment(const T* x, const uint8_t* mask, T* out, int64_t begin, int64_t end,
                    double gamma, double sum) {
  for (int64_t i = end - 1; i >= begin; --i) {
    sum = discounted(mask[i] ? static_cast<double>(x[i]) : 0.0, sum,
                     gamma);  // select, not multiply: NaN * 0 is NaN
    out[i] = static_cast<T>(sum);
  }
  return sum;
}

template <typename T>
void scan(const T* x, const uint8_t* mask, T* out, const int64_t* offsets, int64_t segments,
          double gamma, int64_t threads) {
  for_segments(offsets, segments, threads, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b)
      scan_segment(x, mask, out, offsets[b], offsets[b + 1], gamma, 0.0);
  });
}

// Children come after their parents, so one sweep from the last node to the first meets every child
// before its parent.
template <typename T>
void scan_tree(const T* x, const uint8_t* mask, T* out, const int64_t* offsets, int64_t nodes,
               const int64_t* parent, const double* weight, double gamma) {
  std::vector<double> carry(static_cast<size_t>(nodes), 0.0);
  for (int64_t n = nodes - 1; n >= 0; --n) {
    const double first = scan_segment(x, mask, out, offsets[n], offsets[n + 1], gamma, carry[n]);
    if (parent[n] >= 0 && weight[n] != 0.0) carry[parent[n]] += weight[n] * first;
  }
}

void future_value(ffi::TensorView x, ffi::TensorView mask, ffi::TensorView offsets, double gamma,
                  ffi::TensorView out, int64_t threads) {
  TVM_FFI_CHECK(x.ndim() == 1, ValueError) << "log_ratio must be [N]";
  const int64_t tokens = x.size(0);
  const uint8_t bits = check_floats(x, "log_ratio", tokens);
  check_vector(out, "out", kDLFloat, bits, tokens);
  check_vector(mask, "mask", kDLUInt, 8, tokens);
  check_gamma(gamma);
  const int64_t* o = check_offsets(offsets, tokens);
  const int64_t segments = offsets.size(0) - 1;
  const auto* m = data<const uint8_t>(mask);
  if (bits == 32) {
    scan(data<const float>(x), m, data<float>(out), o, segments, gamma, threads);
  } else {
    scan(data<const double>(x), m, data<double>(out), o, segments, gamma, threads);
  }
}

void tree_future_value(ffi::TensorView x, ffi::TensorView mask, ffi::TensorView offsets,
                       ffi::TensorView parents, ffi::TensorView weights, double gamma,
                       ffi::TensorView out) {
  TVM_FFI_CHECK(x.ndim() == 1, ValueError) << "log_ratio must be [N]";
  const int64_t tokens = x.size(0);
  const uint8_t bits = check_floats(x, "log_ratio", tokens);
  check_vector(out, "out", kDLFloat, bits, tokens);
  check_vector(mask, "mask", kDLUInt, 8, tokens);
  check_gamma(gamma);
  const int64_t* o = check_offsets(offsets, tokens);
  const int64_t nodes = offsets.size(0) - 1;
  check_vector(parents, "parents", kDLInt, 64, nodes);
  check_vector(weights, "weights", kDLFloat, 64, nodes);
  const auto* p = data<const int64_t>(parents);
  for (int64_t n = 0; n < nodes; ++n) {
    TVM_FFI_CHECK(p[n] >= -1 && p[n] < n, ValueError)
        << "parents[" << n << "] is " << p[n] << ", expected -1 or a node before it";
  }
  const auto* m = data<const uint8_t>(mask);
  const auto* w = data<const double>(weights);
  if (bits == 32) {
    scan_tree(data<const float>(x), m, data<float>(out), o, nodes, p, w, gamma);
  } else {
    scan_tree(data<const double>(x), m, data<double>(out), o, nodes, p, w, gamma);
  }
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(future_value, future_value);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(tree_future_value, tree_future_value);

}  // namespace appo

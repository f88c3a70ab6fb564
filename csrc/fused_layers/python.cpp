// RMSNorm, rotary positions and SwiGLU for training: checks, threads, exported functions. See
// fused_layers.h.

#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/optional.h>
#include <tvm/ffi/string.h>

#include <algorithm>
#include <string>
#include <vector>

#include "common/checks.h"
#include "common/dtypes.h"
#include "common/isa.h"
#include "common/threads.h"
#include "fused_layers/fused_layers.h"

namespace appo {
namespace {

namespace ffi = tvm::ffi;
using Tensor = ffi::TensorView;
using MaybeTensor = ffi::Optional<ffi::TensorView>;

const FusedKernels& kernels_for(const std::string& isa) {
  if (has_avx512() && (isa.empty() || isa == "avx512")) return fused_avx512();
  TVM_FFI_CHECK(has_avx2() && (isa.empty() || isa == "avx2"), ValueError)
      << "isa is '" << isa << "', expected avx512 or avx2, where the machine has it";
  return fused_avx2();
}

// The data of a contiguous CPU tensor with the shape and dtype of `like`.
char* same(const Tensor& t, const char* name, const Tensor& like) {
  TVM_FFI_CHECK(t.device().device_type == kDLCPU && t.IsContiguous(), ValueError)
      << name << " must be contiguous and on the CPU";
  TVM_FFI_CHECK(t.dtype() == like.dtype(), TypeError)
      << name << " has another dtype than the first tensor";
  TVM_FFI_CHECK(t.ndim() == like.ndim(), ValueError)
      << name << " has another shape than the first tensor";
  for (int i = 0; i < t.ndim(); ++i) {
    TVM_FFI_CHECK(t.size(i) == like.size(i), ValueError)
        << name << " has another shape than the first tensor";
  }
  return static_cast<char*>(t.data_ptr());
}

std::vector<float> scratch(int64_t n) {
  return std::vector<float>(static_cast<size_t>(kFusedScratch * fused_width(n)));
}

std::vector<float> widened(const FusedKernels& k, const Tensor& t, const char* name, int64_t n) {
  TVM_FFI_CHECK(
      t.device().device_type == kDLCPU && t.ndim() == 1 && t.size(0) == n && t.IsContiguous(),
      ValueError)
      << name << " must be a contiguous vector of " << n << " numbers on the CPU";
  std::vector<float> out(static_cast<size_t>(fused_width(n)));
  k.widen(static_cast<const char*>(t.data_ptr()), n, dtype_of(t, name), out.data());
  return out;
}

// body(first, last) for shares of `units` units of work of `numbers` numbers each, on as many
// threads as pay.
template <typename Body>
void share(int64_t units, int64_t numbers, int64_t threads, const Body& body) {
  const int64_t paid = units * numbers / 65536,
                parts =
                    std::clamp<int64_t>(std::min(threads, paid), 1, std::max<int64_t>(units, 1));
  run_parts(parts, [&](int64_t part) { body(units * part / parts, units * (part + 1) / parts); });
}

struct Rows {
  int64_t rows, columns;
  int64_t units() const { return (rows + kFusedRows - 1) / kFusedRows; }
};

Rows rows_of(const Tensor& x) {
  TVM_FFI_CHECK(x.ndim() == 2 && x.size(1) >= 1, ValueError) << "x must be [rows, columns]";
  return {x.size(0), x.size(1)};
}

float* factors(const Tensor& t, int64_t rows) {
  check_vector(t, "factor", kDLFloat, 32, rows);
  return data<float>(t);
}

// y like x[T, H], factor[T] float32.
void rms_norm_forward(Tensor x, Tensor weight, double eps, Tensor y, Tensor factor, ffi::String isa,
                      int64_t threads) {
  const FusedKernels& k = kernels_for(isa);
  const Dtype dtype = dtype_of(x, "x");
  const Rows r = rows_of(x);
  const auto w = widened(k, weight, "weight", r.columns);
  const char* from = same(x, "x", x);
  char* to = same(y, "y", x);
  float* f = factors(factor, r.rows);
  const int64_t step = r.columns * bytes_of(dtype);
  share(r.units(), kFusedRows * r.columns, threads, [&](int64_t first, int64_t last) {
    auto room = scratch(r.columns);
    for (int64_t i = first * kFusedRows; i < std::min(last * kFusedRows, r.rows); ++i) {
      f[i] = k.norm(from + i * step, w.data(), r.columns, static_cast<float>(eps), dtype,
                    to + i * step, room.data());
    }
  });
}

// dx like x and dweight[H] float32, either of them or both.
void rms_norm_backward(Tensor x, Tensor weight, Tensor factor, Tensor dy, MaybeTensor dx,
                       MaybeTensor dweight, ffi::String isa, int64_t threads) {
  const FusedKernels& k = kernels_for(isa);
  const Dtype dtype = dtype_of(x, "x");
  const Rows r = rows_of(x);
  const auto w = widened(k, weight, "weight", r.columns);
  const char *from = same(x, "x", x), *up = same(dy, "dy", x);
  char* to = dx.has_value() ? same(*dx, "dx", x) : nullptr;
  const float* f = factors(factor, r.rows);
  const int64_t step = r.columns * bytes_of(dtype), width = fused_width(r.columns);
  std::vector<float> sums(dweight.has_value() ? static_cast<size_t>(r.units() * width) : 0);
  share(r.units(), kFusedRows * r.columns, threads, [&](int64_t first, int64_t last) {
    auto room = scratch(r.columns);
    for (int64_t i = first * kFusedRows; i < std::min(last * kFusedRows, r.rows); ++i) {
      float* dw = dweight.has_value() ? sums.data() + i / kFusedRows * width : nullptr;
      k.norm_grad(from + i * step, w.data(), f[i], up + i * step, r.columns, dtype,
                  to ? to + i * step : nullptr, dw, room.data());
    }
  });
  if (!dweight.has_value()) return;
  check_vector(*dweight, "dweight", kDLFloat, 32, r.columns);
  for (int64_t j = 0; j < r.columns; ++j) {
    double sum = 0.0;
    for (int64_t unit = 0; unit < r.units(); ++unit)
      sum += sums[static_cast<size_t>(unit * width + j)];
    data<float>(*dweight)[j] = static_cast<float>(sum);
  }
}

template <typename Body>
void for_chunks(const Tensor& x, int64_t threads, const Body& body) {
  const int64_t n = x.numel();
  share((n + kFusedChunk - 1) / kFusedChunk, kFusedChunk, threads,
        [&](int64_t first, int64_t last) {
          auto room = scratch(kFusedChunk);
          for (int64_t unit = first; unit < last; ++unit) {
            body(unit * kFusedChunk, std::min(kFusedChunk, n - unit * kFusedChunk), room.data());
          }
        });
}

void swiglu_forward(Tensor gate, Tensor up, Tensor out, ffi::String isa, int64_t threads) {
  const FusedKernels& k = kernels_for(isa);
  const Dtype dtype = dtype_of(gate, "gate");
  const char *g = same(gate, "gate", gate), *u = same(up, "up", gate);
  char* to = same(out, "out", gate);
  const int64_t size = bytes_of(dtype);
  for_chunks(gate, threads, [&](int64_t at, int64_t n, float* room) {
    k.swiglu(g + at * size, u + at * size, n, dtype, to + at * size, room);
  });
}

void swiglu_backward(Tensor gate, Tensor up, Tensor d_out, Tensor d_gate, Tensor d_up,
                     ffi::String isa, int64_t threads) {
  const FusedKernels& k = kernels_for(isa);
  const Dtype dtype = dtype_of(gate, "gate");
  const char *g = same(gate, "gate", gate), *u = same(up, "up", gate),
             *d = same(d_out, "d_out", gate);
  char *dg = same(d_gate, "d_gate", gate), *du = same(d_up, "d_up", gate);
  const int64_t size = bytes_of(dtype);
  for_chunks(gate, threads, [&](int64_t at, int64_t n, float* room) {
    const int64_t by = at * size;
    k.swiglu_grad(g + by, u + by, d + by, n, dtype, dg + by, du + by, room);
  });
}

// The row of t[T, n], of any row stride.
const char* angles(const Tensor& t, const char* name, int64_t rows, int64_t n) {
  TVM_FFI_CHECK(t.device().device_type == kDLCPU && t.ndim() == 2 && t.size(0) == rows &&
                    t.size(1) == n && (n < 2 || t.stride(1) == 1),
                ValueError)
      << name << " must be [" << rows << ", " << n << "] on the CPU with a last stride of 1";
  return static_cast<const char*>(t.data_ptr());
}

// out like x[T, heads, D]; cos and sin [T, D / 2] in one dtype; back: by the negative angle.
void rotary(Tensor x, Tensor cos, Tensor sin, bool back, Tensor out, ffi::String isa,
            int64_t threads) {
  const FusedKernels& k = kernels_for(isa);
  const Dtype dtype = dtype_of(x, "x"), of_angles = dtype_of(cos, "cos");
  TVM_FFI_CHECK(x.ndim() == 3 && x.size(2) % 2 == 0, ValueError)
      << "x must be [tokens, heads, an even number]";
  const int64_t tokens = x.size(0), heads = x.size(1), half = x.size(2) / 2,
                width = fused_width(half);
  const char *c = angles(cos, "cos", tokens, half), *s = angles(sin, "sin", tokens, half);
  TVM_FFI_CHECK(sin.dtype() == cos.dtype(), TypeError) << "cos and sin must have one dtype";
  const char* from = same(x, "x", x);
  char* to = same(out, "out", x);
  const int64_t step = 2 * half * bytes_of(dtype);
  share(tokens, heads * half * 2, threads, [&](int64_t first, int64_t last) {
    auto room = scratch(half);
    float *a = room.data() + 2 * width, *b = a + width;
    for (int64_t i = first; i < last; ++i) {
      k.widen(c + i * cos.stride(0) * bytes_of(of_angles), half, of_angles, a);
      k.widen(s + i * sin.stride(0) * bytes_of(of_angles), half, of_angles, b);
      if (back) std::transform(b, b + width, b, [](float v) { return -v; });
      for (int64_t h = i * heads; h < (i + 1) * heads; ++h) {
        k.rotate(from + h * step, a, b, half, dtype, to + h * step, room.data());
      }
    }
  });
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(rms_norm_forward, rms_norm_forward);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(rms_norm_backward, rms_norm_backward);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(swiglu_forward, swiglu_forward);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(swiglu_backward, swiglu_backward);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(rotary, rotary);

}  // namespace appo

// The fused output head: checks, choice of the instruction set, exported functions. See
// linear_logprob.h for the parts.

#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/optional.h>
#include <tvm/ffi/string.h>

#include <algorithm>
#include <string>

#include "common/checks.h"
#include "common/dtypes.h"
#include "common/isa.h"
#include "linear_logprob/problem.h"

namespace appo {
namespace {

namespace ffi = tvm::ffi;
using MaybeTensor = ffi::Optional<ffi::TensorView>;

// "" is the best for these inputs. bf16 products need bf16 factors; everything else is multiplied
// as float32.
const LinearKernels& choose(const std::string& isa, const Matrix& h, const Matrix& w) {
  const bool both_bf16 = h.dtype == Dtype::bf16 && w.dtype == Dtype::bf16;
  if ((isa.empty() || isa == "avx512_bf16") && both_bf16 && has_avx512_bf16())
    return linear_avx512_bf16();
  TVM_FFI_CHECK(isa != "avx512_bf16", ValueError)
      << "isa is avx512_bf16; that needs bfloat16 h and w and a machine that has it (this one: "
      << best_isa() << ")";
  if ((isa.empty() || isa == "avx512") && has_avx512()) return linear_avx512();
  if ((isa.empty() || isa == "avx2") && has_avx2()) return linear_avx2();
  TVM_FFI_THROW(ValueError) << "isa is '" << isa
                            << "', expected avx512_bf16, avx512 or avx2, and this machine has '"
                            << best_isa() << "'";
}

Matrix matrix_of(const ffi::TensorView& t, const char* name) {
  TVM_FFI_CHECK(t.device().device_type == kDLCPU, ValueError) << name << " must be on the CPU";
  TVM_FFI_CHECK(t.ndim() == 2, ValueError) << name << " must have 2 dimensions, has " << t.ndim();
  return {static_cast<const char*>(t.data_ptr()),
          dtype_of(t, name),
          t.size(1),
          t.stride(0),
          t.stride(1),
          nullptr};
}

char* output(const ffi::TensorView& t, const char* name, int64_t rows, int64_t columns) {
  TVM_FFI_CHECK(t.device().device_type == kDLCPU && t.ndim() == 2 && t.size(0) == rows &&
                    t.size(1) == columns && t.IsContiguous(),
                ValueError)
      << name << " must be a contiguous [" << rows << ", " << columns << "] on the CPU";
  return static_cast<char*>(t.data_ptr());
}

const float* floats(const ffi::TensorView& t, const char* name, int64_t size) {
  check_vector(t, name, kDLFloat, 32, size);
  return data<float>(t);
}

LinearProblem problem_of(const ffi::TensorView& h, const ffi::TensorView& w,
                         const MaybeTensor& rows, const ffi::TensorView& users,
                         const ffi::TensorView& column, const ffi::TensorView& scale,
                         double softcap, const MaybeTensor& prob_cache, const ffi::String& isa,
                         int64_t threads) {
  LinearProblem p{};
  p.h = matrix_of(h, "h");
  p.w = matrix_of(w, "w");
  TVM_FFI_CHECK(p.h.columns == p.w.columns && p.h.columns >= 1 && w.size(0) >= 1, ValueError)
      << "h is [" << h.size(0) << ", " << h.size(1) << "] and w is [" << w.size(0) << ", "
      << w.size(1) << "]; expected [T, H] and [V, H] with H and V at least 1";
  p.vocab = w.size(0);
  p.hidden = p.h.columns;
  TVM_FFI_CHECK(column.ndim() == 1 && column.size(0) >= 1, ValueError)
      << "column must be [N] with N at least 1";
  const int64_t n = column.size(0);
  check_vector(column, "column", kDLInt, 64, n);
  p.column = data<const int64_t>(column);
  p.scale = floats(scale, "scale", n);
  p.users = check_offsets(users, n);
  p.used_rows = users.size(0) - 1;
  if (rows.has_value()) {
    check_vector(*rows, "rows", kDLInt, 64, p.used_rows);
    p.h.rows = data<const int64_t>(*rows);
    for (int64_t i = 0; i < p.used_rows; ++i) {
      TVM_FFI_CHECK(p.h.rows[i] >= 0 && p.h.rows[i] < h.size(0), ValueError)
          << "rows[" << i << "] is " << p.h.rows[i] << ", expected 0 … " << h.size(0) - 1;
    }
  } else {
    TVM_FFI_CHECK(p.used_rows == h.size(0), ValueError)
        << "users covers " << p.used_rows << " of " << h.size(0) << " rows";
  }
  TVM_FFI_CHECK(softcap >= 0.0, ValueError)
      << "softcap is " << softcap << ", expected > 0, or 0 for none";
  p.softcap = static_cast<float>(softcap);
  p.k = &choose(isa, p.h, p.w);
  // Both directions find the same number of cached tiles. Float32 inputs have none: halves are too
  // coarse for them.
  if (prob_cache.has_value() && softcap == 0.0 && p.h.dtype != Dtype::f32 &&
      p.w.dtype != Dtype::f32) {
    const ffi::TensorView bytes = *prob_cache;
    check_vector(bytes, "prob_cache", kDLUInt, 8, bytes.numel());
    p.cached_tiles = std::clamp<int64_t>((bytes.numel() / n - kCacheHead) / kCacheTile, 0,
                                         ceil_div(p.vocab, kTile));
    p.prob_cache = p.cached_tiles > 0 ? data<char>(bytes) : nullptr;
  }
  // A thread must have enough to do to be worth starting: 10 million multiplications are about 0.1
  // ms.
  const double work = static_cast<double>(p.used_rows) * static_cast<double>(p.vocab) *
                      static_cast<double>(p.hidden);
  p.threads =
      std::clamp<int64_t>(static_cast<int64_t>(work / 1e7), 1, std::max<int64_t>(threads, 1));
  return p;
}

// out[4, N] = (m, s, u, z) per target; see kernels/linear_logprob/backend_cpu.py for the arguments.
void linear_logprob_stats(ffi::TensorView h, ffi::TensorView w, MaybeTensor rows, ffi::TensorView users,
                  ffi::TensorView column, ffi::TensorView scale, double softcap,
                  ffi::TensorView out, MaybeTensor prob_cache, ffi::String isa, int64_t threads) {
  const LinearProblem p =
      problem_of(h, w, rows, users, column, scale, softcap, prob_cache, isa, threads);
  TVM_FFI_CHECK(out.dtype().code == kDLFloat && out.dtype().bits == 32, TypeError)
      << "out must be float32";
  linear_forward(p, reinterpret_cast<float*>(output(out, "out", 4, column.size(0))));
}

void linear_logprob_grads(ffi::TensorView h, ffi::TensorView w, MaybeTensor rows, ffi::TensorView users,
                  ffi::TensorView column, ffi::TensorView scale, double softcap, ffi::TensorView m,
                  ffi::TensorView log2s, ffi::TensorView p_factor, MaybeTensor plogp_factor,
                  ffi::TensorView d_logp, MaybeTensor dh, MaybeTensor dh_low, MaybeTensor dw,
                  MaybeTensor d_scale, MaybeTensor prob_cache, ffi::String isa, int64_t threads) {
  const LinearProblem p =
      problem_of(h, w, rows, users, column, scale, softcap, prob_cache, isa, threads);
  const int64_t n = column.size(0);
  LinearGrads g{};
  g.m = floats(m, "m", n);
  g.log2s = floats(log2s, "log2s", n);
  g.p_factor = floats(p_factor, "p_factor", n);
  g.plogp_factor = plogp_factor.has_value() ? floats(*plogp_factor, "plogp_factor", n) : nullptr;
  g.d_logp = floats(d_logp, "d_logp", n);
  if (dh.has_value()) {
    char* to = output(*dh, "dh", h.size(0), p.hidden);
    const Dtype dtype = dtype_of(*dh, "dh");
    TVM_FFI_CHECK(dtype == Dtype::f32 || dh_low.has_value(), ValueError)
        << "a bfloat16 dh needs dh_low";
    TVM_FFI_CHECK(dtype != Dtype::f16, TypeError) << "dh must be float32 or bfloat16";
    if (dtype == Dtype::f32) {
      g.dh_f32 = reinterpret_cast<float*>(to);
    } else {
      g.dh_bf16 = reinterpret_cast<uint16_t*>(to);
      TVM_FFI_CHECK(dh_low.value().dtype().bits == 16, TypeError)
          << "dh_low must have items of 16 bits";
      g.dh_low = reinterpret_cast<uint16_t*>(output(*dh_low, "dh_low", p.used_rows, p.hidden));
    }
  }
  if (dw.has_value()) {
    g.dw = output(*dw, "dw", p.vocab, p.hidden);
    g.dw_dtype = dtype_of(*dw, "dw");
  }
  if (d_scale.has_value()) {
    check_vector(*d_scale, "d_scale", kDLFloat, 32, n);
    g.d_scale = data<float>(*d_scale);
  }
  linear_backward(p, g);
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(linear_logprob_stats, linear_logprob_stats);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(linear_logprob_grads, linear_logprob_grads);

}  // namespace appo

// Attention over lists of KV segments: checks, choice of the instruction set, exported function. See attention.h.

#ifdef APPO_LINEAR_KERNELS

#include "attention.h"

#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/string.h>

#include <algorithm>
#include <string>

#include "checks.h"
#include "isa.h"

namespace appo {
namespace {

namespace ffi = tvm::ffi;

// [rows, heads, dim] with whole heads one after another; returns the stride between rows, in elements.
int64_t check_heads(const ffi::TensorView& t, const char* name, int64_t rows, int64_t heads, const ffi::TensorView& q) {
  TVM_FFI_CHECK(t.device().device_type == kDLCPU, ValueError) << name << " must be on the CPU";
  TVM_FFI_CHECK(t.ndim() == 3 && t.size(0) == rows && t.size(1) == heads && t.size(2) == q.size(2), ValueError)
      << name << " must be [" << rows << ", " << heads << ", " << q.size(2) << "]";
  TVM_FFI_CHECK(t.dtype() == q.dtype(), TypeError) << name << " must have the dtype of q";
  TVM_FFI_CHECK(t.stride(2) == 1 && (heads == 1 || t.stride(1) == t.size(2)), ValueError)
      << name << " must have strides [any, " << t.size(2) << ", 1]";
  return t.stride(0);
}

// int64 [n, sizeof(Item) / 8], contiguous.
template <typename Item>
const Item* check_table(const ffi::TensorView& t, const char* name) {
  constexpr int64_t columns = sizeof(Item) / 8;
  TVM_FFI_CHECK(t.device().device_type == kDLCPU && t.ndim() == 2 && t.size(1) == columns && t.IsContiguous(),
                ValueError)
      << name << " must be a contiguous [n, " << columns << "] on the CPU";
  TVM_FFI_CHECK(t.dtype().code == kDLInt && t.dtype().bits == 64, TypeError) << name << " must be int64";
  return data<const Item>(t);
}

// Addresses are taken on trust; that nothing beyond a segment's capacity is touched is checked.
void check_plan(const AttentionProblem& p, int64_t segments, int64_t limits) {
  for (int64_t i = 0; i < p.read_count; ++i) {
    const Read& r = p.reads[i];
    TVM_FFI_CHECK(r.segment >= 0 && r.segment < segments && r.a >= 0 && r.a <= r.b && r.b <= p.rows && r.limits >= 0 &&
                      r.limits + (r.b - r.a) <= limits,
                  ValueError)
        << "reads[" << i << "] is (" << r.segment << ", " << r.a << ", " << r.b << ", " << r.limits << "); there are "
        << segments << " segments, " << p.rows << " rows and " << limits << " limits";
    for (int64_t j = r.limits; j < r.limits + r.b - r.a; ++j) {
      TVM_FFI_CHECK(p.limits[j] >= 0 && p.limits[j] <= p.segments[r.segment].capacity, ValueError)
          << "limits[" << j << "] is " << p.limits[j] << ", expected 0 … " << p.segments[r.segment].capacity
          << ", the positions of segment " << r.segment;
    }
  }
  for (int64_t i = 0; i < p.write_count; ++i) {
    const Write& w = p.writes[i];
    TVM_FFI_CHECK(w.row >= 0 && w.row < p.rows && w.segment >= 0 && w.segment < segments && w.position >= 0 &&
                      w.position < p.segments[w.segment].capacity,
                  ValueError)
        << "writes[" << i << "] is (" << w.row << ", " << w.segment << ", " << w.position << "); there are " << p.rows
        << " rows, " << segments << " segments, and a position must lie below its segment's capacity";
  }
}

void choose(AttentionProblem& p, const std::string& isa) {
  const bool bf16 = p.dtype == Dtype::bf16 && has_avx512_bf16();
  if (bf16 && (isa.empty() || isa == "avx512_bf16")) {
    p.products = &linear_avx512_bf16();
    p.rows_of = &attention_avx512_bf16();
  } else if (has_avx512() && (isa.empty() || isa == "avx512")) {
    p.products = &linear_avx512();
    p.rows_of = &attention_avx512();
  } else {
    TVM_FFI_CHECK(has_avx2() && (isa.empty() || isa == "avx2"), ValueError)
        << "isa is '" << isa << "', expected avx512_bf16 (for bfloat16), avx512 or avx2, where the machine has it";
    p.products = &linear_avx2();
    p.rows_of = &attention_avx2();
  }
}

// A thread must have enough to do to be worth starting: 10 million multiplications are about 0.15 ms.
int64_t threads_for(const AttentionProblem& p, int64_t threads) {
  double pairs = 0.0;
  for (int64_t i = 0; i < p.read_count; ++i) {
    const Read& r = p.reads[i];
    for (int64_t j = r.limits; j < r.limits + r.b - r.a; ++j) pairs += static_cast<double>(p.limits[j]);
  }
  const double work = 2.0 * pairs * static_cast<double>(p.heads * p.dim);
  return std::clamp<int64_t>(static_cast<int64_t>(work / 1e7), 1, std::max<int64_t>(threads, 1));
}

// See appo/rollout/native/segments.py for the tables.
void attend_segments(ffi::TensorView q, ffi::TensorView k, ffi::TensorView v, ffi::TensorView segments,
                     ffi::TensorView reads, ffi::TensorView limits, ffi::TensorView writes, int64_t layer,
                     ffi::TensorView out, int64_t tile_rows, ffi::String isa, int64_t threads) {
  TVM_FFI_CHECK(q.ndim() == 3 && k.ndim() == 3, ValueError) << "q must be [M, Hq, D] and k [M, Hkv, D]";
  AttentionProblem p{};
  const auto type = q.dtype();
  TVM_FFI_CHECK((type.code == kDLFloat && (type.bits == 32 || type.bits == 16)) ||
                    (type.code == kDLBfloat && type.bits == 16),
                TypeError)
      << "q must be float32, bfloat16 or float16";
  p.dtype = type.code == kDLBfloat ? Dtype::bf16 : type.bits == 16 ? Dtype::f16 : Dtype::f32;
  p.rows = q.size(0);
  p.heads = q.size(1);
  p.kv_heads = k.size(1);
  p.dim = q.size(2);
  p.layer = layer;
  TVM_FFI_CHECK(p.kv_heads >= 1 && p.heads >= 1 && p.heads % p.kv_heads == 0, ValueError)
      << p.heads << " query heads cannot share " << p.kv_heads << " heads of keys";
  TVM_FFI_CHECK(p.dim >= 1 && p.dim <= kMostDim, ValueError)
      << "the head dimension is " << p.dim << ", expected 1 … " << kMostDim;
  p.q = static_cast<const char*>(q.data_ptr());
  p.k = static_cast<const char*>(k.data_ptr());
  p.v = static_cast<const char*>(v.data_ptr());
  p.q_stride = check_heads(q, "q", p.rows, p.heads, q);
  p.k_stride = check_heads(k, "k", p.rows, p.kv_heads, q);
  p.v_stride = check_heads(v, "v", p.rows, p.kv_heads, q);
  TVM_FFI_CHECK(check_heads(out, "out", p.rows, p.heads, q) == p.heads * p.dim || p.rows < 2, ValueError)
      << "out must be contiguous";
  p.out = static_cast<char*>(out.data_ptr());
  p.segments = check_table<Segment>(segments, "segments");
  p.reads = check_table<Read>(reads, "reads");
  p.writes = check_table<Write>(writes, "writes");
  p.read_count = reads.size(0);
  p.write_count = writes.size(0);
  check_vector(limits, "limits", kDLInt, 64, limits.numel());
  p.limits = data<const int64_t>(limits);
  check_plan(p, segments.size(0), limits.numel());
  TVM_FFI_CHECK(tile_rows >= 0, ValueError) << "tile_rows is " << tile_rows << ", expected >= 1, or 0 for the default";
  p.tile_rows = tile_rows == 0 ? kTileRows : tile_rows;
  p.threads = threads_for(p, threads);
  choose(p, isa);
  if (p.rows > 0) attention(p);
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(attend_segments, attend_segments);

}  // namespace appo

#endif

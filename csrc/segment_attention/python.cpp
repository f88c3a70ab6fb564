// Attention over KV segments: checks, choice of the instruction set, exported function. See
// segment_attention.h.

#include <tvm/ffi/error.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/string.h>

#include <algorithm>
#include <string>

#include "common/checks.h"
#include "common/isa.h"
#include "segment_attention/tables.h"

namespace appo {
namespace {

namespace ffi = tvm::ffi;

// int64 [n, sizeof(Item) / 8], contiguous.
template <typename Item>
const Item* check_table(const ffi::TensorView& t, const char* name) {
  constexpr int64_t columns = sizeof(Item) / 8;
  TVM_FFI_CHECK(
      t.device().device_type == kDLCPU && t.ndim() == 2 && t.size(1) == columns && t.IsContiguous(),
      ValueError)
      << name << " must be a contiguous [n, " << columns << "] on the CPU";
  TVM_FFI_CHECK(t.dtype().code == kDLInt && t.dtype().bits == 64, TypeError)
      << name << " must be int64";
  return data<const Item>(t);
}

const int64_t* check_list(const ffi::TensorView& t, const char* name, int64_t size) {
  check_vector(t, name, kDLInt, 64, size);
  return data<const int64_t>(t);
}

void check_shape(const AttentionShape& s) {
  TVM_FFI_CHECK(s.kv_heads >= 1 && s.heads >= 1 && s.heads % s.kv_heads == 0, ValueError)
      << s.heads << " query heads cannot share " << s.kv_heads << " heads of keys";
  TVM_FFI_CHECK(s.dim >= 1 && s.dim <= kMostDim && (s.dtype == Dtype::f32 || s.dim % 2 == 0),
                ValueError)
      << "the head dimension is " << s.dim << ", expected 1 … " << kMostDim
      << ", even for bfloat16";
}

void check_segments(const AttentionProblem& p, int64_t segments, int64_t listed, int64_t pool) {
  for (int64_t i = 0; i < segments; ++i) {
    const Segment& s = p.segments[i];
    TVM_FFI_CHECK(s.first >= 0 && s.positions >= 0 && s.first <= listed &&
                      s.positions <= (listed - s.first) * kBlock,
                  ValueError)
        << "segments[" << i << "] is (" << s.first << ", " << s.positions << "), with " << kBlock
        << " positions a block; " << listed << " blocks are listed";
  }
  for (int64_t i = 0; i < listed; ++i) {
    TVM_FFI_CHECK(p.blocks[i] >= 0 && p.blocks[i] < pool, ValueError)
        << "blocks[" << i << "] is " << p.blocks[i] << ", expected 0 … " << pool - 1
        << ", a block of the pool";
  }
  for (int64_t i = 0; i < p.shape.rows; ++i) {
    TVM_FFI_CHECK(p.slots[i] >= -1 && p.slots[i] < pool * kBlock, ValueError)
        << "slots[" << i << "] is " << p.slots[i] << ", expected -1 … " << pool * kBlock - 1
        << "; the pool has " << pool << " blocks";
  }
}

void check_reads(const AttentionProblem& p, int64_t segments, int64_t limits) {
  for (int64_t i = 0; i < p.read_count; ++i) {
    const Read& r = p.reads[i];
    TVM_FFI_CHECK(r.segment >= 0 && r.segment < segments && r.a >= 0 && r.a <= r.b &&
                      r.b <= p.shape.rows && r.limits >= 0 && r.limits <= limits - (r.b - r.a),
                  ValueError)
        << "reads[" << i << "] is (" << r.segment << ", " << r.a << ", " << r.b << ", " << r.limits
        << "); there are " << segments << " segments, " << p.shape.rows << " rows and " << limits
        << " limits";
    for (int64_t j = r.limits; j < r.limits + r.b - r.a; ++j) {
      TVM_FFI_CHECK(p.limits[j] >= 0 && p.limits[j] <= p.segments[r.segment].positions, ValueError)
          << "limits[" << j << "] is " << p.limits[j] << ", expected 0 … "
          << p.segments[r.segment].positions << ", the positions of segment " << r.segment;
    }
  }
}

const AttentionKernels* kernels_for(const std::string& isa, Dtype dtype) {
  const AttentionKernels* k = nullptr;
  if (has_avx512_bf16() && (isa.empty() || isa == "avx512_bf16")) k = attention_avx512_bf16(dtype);
  if (!k && has_avx512() && (isa.empty() || isa == "avx512")) k = attention_avx512(dtype);
  if (!k && has_avx2() && (isa.empty() || isa == "avx2")) k = attention_avx2(dtype);
  TVM_FFI_CHECK(k != nullptr, ValueError)
      << "isa is '" << isa
      << "', expected avx512_bf16 (for bfloat16), avx512 or avx2, where the machine has it";
  return k;
}

// 2 million multiplications take some 50 microseconds, for which it is worth waking a thread.
int64_t threads_for(const AttentionProblem& p, int64_t threads) {
  double pairs = 0.0;
  for (int64_t i = 0; i < p.read_count; ++i) {
    const Read& r = p.reads[i];
    for (int64_t j = r.limits; j < r.limits + r.b - r.a; ++j)
      pairs += static_cast<double>(p.limits[j]);
  }
  const double work = 2.0 * pairs * static_cast<double>(p.shape.heads * p.shape.dim);
  return std::clamp<int64_t>(static_cast<int64_t>(work / 2e6), 1, std::max<int64_t>(threads, 1));
}

}  // namespace

AttentionProblem attention_problem(const AttentionShape& shape, const AttentionTables& tables,
                                   const std::string& isa, int64_t threads) {
  AttentionProblem p{};
  check_shape(shape);
  p.shape = shape;
  p.addresses = check_list(tables.addresses, "addresses", tables.addresses.numel());
  p.blocks = check_list(tables.blocks, "blocks", tables.blocks.numel());
  p.slots = check_list(tables.slots, "slots", shape.rows);
  p.limits = check_list(tables.limits, "limits", tables.limits.numel());
  p.segments = check_table<Segment>(tables.segments, "segments");
  p.reads = check_table<Read>(tables.reads, "reads");
  p.read_count = tables.reads.size(0);
  check_segments(p, tables.segments.size(0), tables.blocks.numel(), tables.addresses.numel());
  check_reads(p, tables.segments.size(0), tables.limits.numel());
  p.kernels = kernels_for(isa, shape.dtype);
  p.tile_rows = kTileRows;
  p.threads = threads_for(p, threads);
  return p;
}

namespace {

// [rows, heads, dim] with whole heads one after another; returns the stride between rows, in
// elements.
int64_t check_heads(const ffi::TensorView& t, const char* name, int64_t rows, int64_t heads,
                    const ffi::TensorView& q) {
  TVM_FFI_CHECK(t.device().device_type == kDLCPU, ValueError) << name << " must be on the CPU";
  TVM_FFI_CHECK(t.ndim() == 3 && t.size(0) == rows && t.size(1) == heads && t.size(2) == q.size(2),
                ValueError)
      << name << " must be [" << rows << ", " << heads << ", " << q.size(2) << "]";
  TVM_FFI_CHECK(t.dtype() == q.dtype(), TypeError) << name << " must have the dtype of q";
  TVM_FFI_CHECK(t.stride(2) == 1 && (heads == 1 || t.stride(1) == t.size(2)), ValueError)
      << name << " must have strides [any, " << t.size(2) << ", 1]";
  return t.stride(0);
}

void segment_attention(ffi::TensorView q, ffi::TensorView k, ffi::TensorView v, ffi::TensorView slots,
                     ffi::TensorView segments, ffi::TensorView blocks, ffi::TensorView reads,
                     ffi::TensorView limits, ffi::TensorView addresses, int64_t layers,
                     int64_t layer, ffi::TensorView out, int64_t tile_rows, ffi::String isa,
                     int64_t threads) {
  TVM_FFI_CHECK(q.ndim() == 3 && k.ndim() == 3, ValueError)
      << "q must be [M, Hq, D] and k [M, Hkv, D]";
  const auto type = q.dtype();
  const bool f32 = type.code == kDLFloat && type.bits == 32,
             bf16 = type.code == kDLBfloat && type.bits == 16;
  TVM_FFI_CHECK(f32 || bf16, TypeError) << "q must be float32 or bfloat16";
  TVM_FFI_CHECK(layer >= 0 && layer < layers, ValueError)
      << "layer is " << layer << ", expected 0 … " << layers - 1;
  TVM_FFI_CHECK(tile_rows >= 0, ValueError)
      << "tile_rows is " << tile_rows << ", expected >= 1, or 0 for the default";
  const AttentionShape shape{
      bf16 ? Dtype::bf16 : Dtype::f32, q.size(0), q.size(1), k.size(1), q.size(2), layers};
  AttentionProblem p =
      attention_problem(shape, {slots, segments, blocks, reads, limits, addresses}, isa, threads);
  p.q_stride = check_heads(q, "q", shape.rows, shape.heads, q);
  p.k_stride = check_heads(k, "k", shape.rows, shape.kv_heads, q);
  p.v_stride = check_heads(v, "v", shape.rows, shape.kv_heads, q);
  p.out_stride = check_heads(out, "out", shape.rows, shape.heads, q);
  p.q = data<const char>(q);
  p.k = data<const char>(k);
  p.v = data<const char>(v);
  p.out = data<char>(out);
  p.layer = layer;
  if (tile_rows > 0) p.tile_rows = tile_rows;
  attention(p);
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(segment_attention, segment_attention);

}  // namespace appo

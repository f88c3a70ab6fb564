// Tree attention: checks, choice of the instruction set, exported functions. See tree_attention.h
// for the parts.

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
#include "tree_attention/problem.h"
#include "tree_attention/tree_attention.h"

namespace appo {
namespace {

namespace ffi = tvm::ffi;

// [tokens, heads, dim] with the dtype of q, numbers of a head one after another.
Heads heads_of(const ffi::TensorView& t, const char* name, const ffi::TensorView& q,
               int64_t heads) {
  TVM_FFI_CHECK(t.device().device_type == kDLCPU, ValueError) << name << " must be on the CPU";
  TVM_FFI_CHECK(
      t.ndim() == 3 && t.size(0) == q.size(0) && t.size(1) == heads && t.size(2) == q.size(2),
      ValueError)
      << name << " must be [" << q.size(0) << ", " << heads << ", " << q.size(2) << "]";
  TVM_FFI_CHECK(t.dtype() == q.dtype(), TypeError) << name << " must have the dtype of q";
  TVM_FFI_CHECK(t.size(2) == 1 || t.stride(2) == 1, ValueError)
      << name << " must have a last stride of 1";
  return {static_cast<const char*>(t.data_ptr()), t.stride(0), t.stride(1)};
}

char* result(const ffi::TensorView& t, const char* name, const ffi::TensorView& q, int64_t heads) {
  heads_of(t, name, q, heads);
  TVM_FFI_CHECK(t.IsContiguous(), ValueError) << name << " must be contiguous";
  return static_cast<char*>(t.data_ptr());
}

float* statistics(const ffi::TensorView& t, const char* name, const TreeProblem& p) {
  TVM_FFI_CHECK(t.device().device_type == kDLCPU && t.ndim() == 2 && t.size(0) == p.tokens &&
                    t.size(1) == p.heads && t.IsContiguous() && t.dtype().code == kDLFloat &&
                    t.dtype().bits == 32,
                ValueError)
      << name << " must be a contiguous float32 [" << p.tokens << ", " << p.heads << "] on the CPU";
  return data<float>(t);
}

void choose(TreeProblem& p, const std::string& isa) {
  if (p.dtype == Dtype::bf16 && has_avx512_bf16() && (isa.empty() || isa == "avx512_bf16")) {
    p.products = &matrix_avx512_bf16();
    p.rows = &tree_avx512_bf16();
  } else if (has_avx512() && (isa.empty() || isa == "avx512")) {
    p.products = &matrix_avx512();
    p.rows = &tree_avx512();
  } else {
    TVM_FFI_CHECK(has_avx2() && (isa.empty() || isa == "avx2"), ValueError)
        << "isa is '" << isa
        << "', expected avx512_bf16 (for bfloat16), avx512 or avx2, where the machine has it";
    p.products = &matrix_avx2();
    p.rows = &tree_avx2();
  }
}

// A thread must have enough to do to be worth starting: 10 million multiplications are about 0.1
// ms.
int64_t threads_for(const TreeProblem& p, int64_t threads) {
  double pairs = 0.0;
  for (int64_t i = 0; i < p.tokens; ++i) pairs += static_cast<double>(p.ends[i] - i);
  const double work = 2.0 * pairs * static_cast<double>(p.heads * p.dim);
  return std::clamp<int64_t>(static_cast<int64_t>(work / 1e7), 1, std::max<int64_t>(threads, 1));
}

TreeProblem problem_of(const ffi::TensorView& q, const ffi::TensorView& k, const ffi::TensorView& v,
                       const ffi::TensorView& ends, double scale, const ffi::String& isa,
                       int64_t threads) {
  TVM_FFI_CHECK(q.ndim() == 3 && k.ndim() == 3, ValueError)
      << "q must be [N, Hq, D] and k [N, Hkv, D]";
  TreeProblem p{};
  p.dtype = dtype_of(q, "q");
  p.tokens = q.size(0);
  p.heads = q.size(1);
  p.kv_heads = k.size(1);
  p.dim = q.size(2);
  TVM_FFI_CHECK(p.tokens >= 1 && p.tokens <= kTreeTokens, ValueError)
      << "there are " << p.tokens << " tokens, expected 1 … " << kTreeTokens;
  TVM_FFI_CHECK(p.kv_heads >= 1 && p.heads >= 1 && p.heads % p.kv_heads == 0, ValueError)
      << p.heads << " query heads cannot share " << p.kv_heads << " heads of keys";
  TVM_FFI_CHECK(p.dim >= 1 && p.dim <= kTreeDim, ValueError)
      << "the head dimension is " << p.dim << ", expected 1 … " << kTreeDim;
  p.q = heads_of(q, "q", q, p.heads);
  p.k = heads_of(k, "k", q, p.kv_heads);
  p.v = heads_of(v, "v", q, p.kv_heads);
  check_vector(ends, "subtree_end", kDLInt, 32, p.tokens);
  p.ends = data<const int32_t>(ends);
  p.scale = static_cast<float>(scale);
  p.threads = threads_for(p, threads);
  choose(p, isa);
  return p;
}

// out like q, lse[N, Hq]; see kernels/tree_attention_cpu.py. That the intervals are nested is
// checked there.
void tree_attention_forward(ffi::TensorView q, ffi::TensorView k, ffi::TensorView v,
                            ffi::TensorView subtree_end, double scale, ffi::TensorView out,
                            ffi::TensorView lse, ffi::String isa, int64_t threads) {
  const TreeProblem p = problem_of(q, k, v, subtree_end, scale, isa, threads);
  tree_forward(p, result(out, "out", q, p.heads), statistics(lse, "lse", p));
}

void tree_attention_backward(ffi::TensorView q, ffi::TensorView k, ffi::TensorView v,
                             ffi::TensorView subtree_end, double scale, ffi::TensorView out,
                             ffi::TensorView lse, ffi::TensorView d_out,
                             ffi::Optional<ffi::TensorView> d_lse, ffi::TensorView dq,
                             ffi::TensorView dk, ffi::TensorView dv, ffi::String isa,
                             int64_t threads) {
  const TreeProblem p = problem_of(q, k, v, subtree_end, scale, isa, threads);
  TreeGrads g{};
  g.o = heads_of(out, "out", q, p.heads);
  g.g = heads_of(d_out, "d_out", q, p.heads);
  g.lse = statistics(lse, "lse", p);
  g.d_lse = d_lse.has_value() ? statistics(*d_lse, "d_lse", p) : nullptr;
  g.dq = result(dq, "dq", q, p.heads);
  g.dk = result(dk, "dk", q, p.kv_heads);
  g.dv = result(dv, "dv", q, p.kv_heads);
  tree_backward(p, g);
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(tree_attention_forward, tree_attention_forward);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(tree_attention_backward, tree_attention_backward);

}  // namespace appo

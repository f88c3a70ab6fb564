// The linears of decoder layers: checks, choice of the instruction set, exported functions. See layer.h for the parts.

#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/object.h>
#include <tvm/ffi/optional.h>
#include <tvm/ffi/string.h>

#include <string>

#include "checks.h"
#ifdef APPO_LINEAR_KERNELS
#include "isa.h"
#include "layer_run.h"
#endif

#ifdef APPO_LINEAR_KERNELS

namespace appo {
namespace {

namespace ffi = tvm::ffi;
using Tensor = ffi::TensorView;
using MaybeTensor = ffi::Optional<ffi::TensorView>;

// "" is the best for the dtype. Bfloat16 needs AVX512-BF16: elsewhere PyTorch runs the layers.
const LayerKernels& kernels_for(const std::string& isa, bool bf16) {
  const bool any = isa.empty();
  if (bf16) {
    TVM_FFI_CHECK((any || isa == "avx512_bf16") && has_avx512_bf16(), ValueError)
        << "isa is '" << isa << "'; bfloat16 layers need avx512_bf16 and a machine that has it";
    return layer_avx512_bf16();
  }
  if ((any || isa == "avx512") && has_avx512()) return layer_avx512();
  TVM_FFI_CHECK((any || isa == "avx2") && has_avx2(), ValueError)
      << "isa is '" << isa << "'; float32 layers run with avx512 or avx2, on a machine that has it";
  return layer_avx2();
}

void check_dtype(const Tensor& t, const char* name, Dtype dtype) {
  const bool right = dtype == Dtype::bf16 ? t.dtype().code == kDLBfloat && t.dtype().bits == 16
                                          : t.dtype().code == kDLFloat && t.dtype().bits == 32;
  TVM_FFI_CHECK(right && t.dtype().lanes == 1, TypeError)
      << name << " must be " << (dtype == Dtype::bf16 ? "bfloat16" : "float32");
}

// The data of a contiguous CPU tensor of rows · columns items, however its dimensions are split.
char* block(const Tensor& t, const char* name, Dtype dtype, int64_t rows, int64_t columns) {
  check_dtype(t, name, dtype);
  TVM_FFI_CHECK(t.device().device_type == kDLCPU && t.IsContiguous(), ValueError)
      << name << " must be contiguous and on the CPU";
  TVM_FFI_CHECK(t.ndim() >= 1 && t.numel() == rows * columns && (t.ndim() == 1 || t.size(0) == rows), ValueError)
      << name << " has " << t.numel() << " items, expected " << rows << " rows of " << columns;
  return static_cast<char*>(t.data_ptr());
}

const float* floats(const Tensor& t, const char* name, int64_t rows, int64_t columns) {
  return reinterpret_cast<const float*>(block(t, name, Dtype::f32, rows, columns));
}

Matrix weight(const Tensor& t, const char* name, Dtype dtype, int64_t out, int64_t in) {
  check_dtype(t, name, dtype);
  TVM_FFI_CHECK(t.device().device_type == kDLCPU && t.ndim() == 2 && t.size(0) == out && t.size(1) == in, ValueError)
      << name << " must be [" << out << ", " << in << "] on the CPU";
  return {static_cast<const char*>(t.data_ptr()), dtype, in, t.stride(0), t.stride(1), nullptr};
}

Packed linear_of(const LinearKernels& k, int64_t out, int64_t in, int64_t half = 0) {
  Packed p;
  p.k = &k;
  p.in = in;
  p.out = out;
  p.half = half;
  return p;
}

// All layers of a model, in one piece of memory.
class StackObj : public ffi::Object {
 public:
  const LayerKernels* k = nullptr;
  LayerShape shape{};
  std::vector<LayerWeights> layers;
  Scratch data{0};
  int64_t floats = 0;

  static constexpr bool _type_mutable = true;
  TVM_FFI_DECLARE_OBJECT_INFO_FINAL("appo.LayerStack", StackObj, ffi::Object);

  LayerWeights& layer(int64_t index) {
    TVM_FFI_CHECK(index >= 0 && index < static_cast<int64_t>(layers.size()), ValueError)
        << "layer is " << index << ", expected 0 … " << layers.size() - 1;
    return layers[index];
  }
};
class Stack : public ffi::ObjectRef {
 public:
  TVM_FFI_DEFINE_OBJECT_REF_METHODS_NULLABLE(Stack, ffi::ObjectRef, StackObj);
};

Stack stack_new(int64_t layers, int64_t hidden, int64_t ff, int64_t heads, int64_t kv_heads, int64_t head_dim,
                double eps, bool bf16, ffi::String isa) {
  TVM_FFI_CHECK(layers > 0 && hidden > 0 && ff > 0 && heads > 0 && kv_heads > 0 && head_dim > 0, ValueError)
      << "every size of the layers must be at least 1";
  TVM_FFI_CHECK(hidden % 2 == 0 && ff % 2 == 0 && head_dim % 2 == 0, ValueError)
      << "hidden " << hidden << ", ff " << ff << " and head_dim " << head_dim << " must be even";
  auto stack = ffi::make_object<StackObj>();
  stack->k = &kernels_for(isa, bf16);
  stack->shape = {hidden, ff, heads, kv_heads, head_dim, static_cast<float>(eps)};
  stack->layers.resize(static_cast<size_t>(layers));
  const LinearKernels& k = *stack->k->linear;
  for (LayerWeights& w : stack->layers) {
    w.qkv = linear_of(k, (heads + 2 * kv_heads) * head_dim, hidden);
    w.o = linear_of(k, hidden, heads * head_dim);
    w.gate_up = linear_of(k, 2 * ff, hidden, ff);
    w.down = linear_of(k, hidden, ff);
    for (const Packed* p : {&w.qkv, &w.o, &w.gate_up, &w.down}) stack->floats += p->floats();
  }
  stack->data = panel_memory(stack->floats);
  float* at = stack->data.get();
  for (LayerWeights& w : stack->layers) {
    for (Packed* p : {&w.qkv, &w.o, &w.gate_up, &w.down}) {
      p->data = at;
      at += p->floats();
    }
  }
  return Stack(stack);
}

int64_t stack_bytes(Stack stack) { return stack->floats * 4; }

void stack_norms(Stack stack, int64_t layer, Tensor norm1, Tensor norm2, MaybeTensor qk_norm) {
  LayerWeights& w = stack->layer(layer);
  const LayerShape& s = stack->shape;
  const int64_t dim = s.head_dim, heads = s.heads + s.kv_heads;
  const float *first = floats(norm1, "norm1", 1, s.hidden), *second = floats(norm2, "norm2", 1, s.hidden);
  w.norm1.assign(first, first + s.hidden);
  w.norm2.assign(second, second + s.hidden);
  if (!qk_norm.has_value()) return;
  const float* both = floats(*qk_norm, "qk_norm", heads, dim);
  w.qk_norm.assign(both, both + heads * dim);
}

Packed& part_of(StackObj& stack, int64_t layer, const std::string& name) {
  LayerWeights& w = stack.layer(layer);
  if (name == "qkv") return w.qkv;
  if (name == "o") return w.o;
  if (name == "gate_up") return w.gate_up;
  TVM_FFI_CHECK(name == "down", ValueError) << "part is '" << name << "', expected qkv, o, gate_up or down";
  return w.down;
}

void stack_pack(Stack stack, int64_t layer, ffi::String part, Tensor w, MaybeTensor bias, int64_t threads) {
  Packed& to = part_of(*stack.get(), layer, part);
  const float* values = bias.has_value() ? floats(*bias, "bias", to.out, 1) : nullptr;
  pack(to, weight(w, "weight", stack->k->dtype, to.out, to.in), values, threads);
}

void stack_adapt(Stack stack, int64_t layer, ffi::String part, MaybeTensor down, MaybeTensor up) {
  Packed& to = part_of(*stack.get(), layer, part);
  TVM_FFI_CHECK(down.has_value() == up.has_value(), ValueError) << "an adapter is a pair: down and up";
  if (!down.has_value()) return adapt(to, Matrix{}, Matrix{});
  const int64_t rank = down.value().ndim() == 2 ? down.value().size(0) : 0;
  TVM_FFI_CHECK(rank > 0, ValueError) << "down must be [rank, " << to.in << "]";
  const Dtype dtype = stack->k->dtype;
  adapt(to, weight(*down, "down", dtype, rank, to.in), weight(*up, "up", dtype, to.out, rank));
}

int64_t rows_of(const Tensor& x) {
  TVM_FFI_CHECK(x.ndim() == 2 && x.size(0) >= 1, ValueError) << "x must be [rows, hidden] with at least one row";
  return x.size(0);
}

void qkv(Stack stack, int64_t layer, Tensor x, Tensor turn, Tensor positions, Tensor q, Tensor k, Tensor v,
         int64_t threads) {
  const LayerWeights& w = stack->layer(layer);
  const LayerShape& s = stack->shape;
  const int64_t rows = rows_of(x), dim = s.head_dim, table = turn.size(0);
  const float* by = floats(turn, "turn", table, dim);
  check_vector(positions, "positions", kDLInt, 64, rows);
  const auto* at = data<const int64_t>(positions);
  for (int64_t i = 0; i < rows; ++i) {
    TVM_FFI_CHECK(at[i] >= 0 && at[i] < table, ValueError)
        << "positions[" << i << "] is " << at[i] << ", expected 0 … " << table - 1;
  }
  const Dtype dtype = stack->k->dtype;
  layer_qkv(*stack->k, s, w, rows, floats(x, "x", rows, s.hidden), by, at, block(q, "q", dtype, rows, s.heads * dim),
            block(k, "k", dtype, rows, s.kv_heads * dim), block(v, "v", dtype, rows, s.kv_heads * dim),
            threads);
}

void mlp(Stack stack, int64_t layer, Tensor attended, Tensor x, int64_t threads) {
  const LayerWeights& w = stack->layer(layer);
  const LayerShape& s = stack->shape;
  const int64_t rows = rows_of(x);
  const char* from = block(attended, "attended", stack->k->dtype, rows, s.heads * s.head_dim);
  float* to = reinterpret_cast<float*>(block(x, "x", Dtype::f32, rows, s.hidden));
  layer_mlp(*stack->k, s, w, rows, from, to, threads);
}

// The output head: a weight of its own.
class HeadObj : public ffi::Object {
 public:
  const LayerKernels* k = nullptr;
  Packed w;
  Scratch data{0};

  static constexpr bool _type_mutable = true;
  TVM_FFI_DECLARE_OBJECT_INFO_FINAL("appo.Head", HeadObj, ffi::Object);
};
class Head : public ffi::ObjectRef {
 public:
  TVM_FFI_DEFINE_OBJECT_REF_METHODS_NULLABLE(Head, ffi::ObjectRef, HeadObj);
};

Head head_new(int64_t vocab, int64_t hidden, bool bf16, ffi::String isa) {
  TVM_FFI_CHECK(vocab > 0 && hidden > 0 && hidden % 2 == 0, ValueError)
      << "the head is [" << vocab << ", " << hidden << "]; expected at least one row and an even number of columns";
  auto head = ffi::make_object<HeadObj>();
  head->k = &kernels_for(isa, bf16);
  head->w = linear_of(*head->k->linear, vocab, hidden);
  head->data = panel_memory(head->w.floats());
  head->w.data = head->data.get();
  return Head(head);
}

int64_t head_bytes(Head head) { return head->w.floats() * 4; }

void head_pack(Head head, Tensor w, int64_t threads) {
  pack(head->w, weight(w, "weight", head->k->dtype, head->w.out, head->w.in), nullptr, threads);
}

void head_logits(Head head, Tensor hidden, Tensor out, int64_t threads) {
  const Packed& w = head->w;
  const int64_t rows = rows_of(hidden);
  const bool of_floats = head->k->dtype == Dtype::bf16 && hidden.dtype().bits == 32;
  const Dtype dtype = of_floats ? Dtype::f32 : head->k->dtype;
  const auto* from = reinterpret_cast<const float*>(block(hidden, "hidden", dtype, rows, w.in));
  auto* to = reinterpret_cast<float*>(block(out, "out", Dtype::f32, rows, w.out));
  logits(*head->k, w, of_floats, {from, w.in * bytes_of(dtype) / 4}, rows, to, threads);
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(layer_stack, stack_new);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(layer_stack_bytes, stack_bytes);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(layer_stack_norms, stack_norms);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(layer_stack_pack, stack_pack);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(layer_stack_adapt, stack_adapt);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(layer_qkv, qkv);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(layer_mlp, mlp);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(layer_head, head_new);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(layer_head_bytes, head_bytes);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(layer_head_pack, head_pack);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(layer_head_logits, head_logits);

}  // namespace appo

#endif

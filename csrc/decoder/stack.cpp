// The layers of a model: packing, adapters, exported functions. See decoder.h for the parts.

#include "decoder/stack.h"

#include <tvm/ffi/function.h>

namespace appo {
namespace {

Stack stack_new(int64_t layers, int64_t hidden, int64_t ff, int64_t heads, int64_t kv_heads,
                int64_t head_dim, double eps, bool bf16, ffi::String isa) {
  TVM_FFI_CHECK(layers > 0 && hidden > 0 && ff > 0 && heads > 0 && kv_heads > 0 && head_dim > 0,
                ValueError)
      << "every size of the layers must be at least 1";
  TVM_FFI_CHECK(hidden % 2 == 0 && ff % 2 == 0 && head_dim % 2 == 0, ValueError)
      << "hidden " << hidden << ", ff " << ff << " and head_dim " << head_dim << " must be even";
  auto stack = ffi::make_object<StackObj>();
  stack->k = &kernels_for(isa, bf16);
  stack->isa = isa;
  stack->shape = {hidden, ff, heads, kv_heads, head_dim, static_cast<float>(eps)};
  stack->layers.resize(static_cast<size_t>(layers));
  const MatrixKernels& k = *stack->k->linear;
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
  const float *first = floats(norm1, "norm1", 1, s.hidden),
              *second = floats(norm2, "norm2", 1, s.hidden);
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
  TVM_FFI_CHECK(name == "down", ValueError)
      << "part is '" << name << "', expected qkv, o, gate_up or down";
  return w.down;
}

void stack_pack(Stack stack, int64_t layer, ffi::String part, Tensor w, MaybeTensor bias,
                int64_t threads) {
  Packed& to = part_of(*stack.get(), layer, part);
  const float* values = bias.has_value() ? floats(*bias, "bias", to.out, 1) : nullptr;
  pack(to, weight(w, "weight", stack->k->dtype, to.out, to.in), values, threads);
}

void stack_adapt(Stack stack, int64_t layer, ffi::String part, MaybeTensor down, MaybeTensor up) {
  Packed& to = part_of(*stack.get(), layer, part);
  TVM_FFI_CHECK(down.has_value() == up.has_value(), ValueError)
      << "an adapter is a pair: down and up";
  if (!down.has_value()) return adapt(to, Matrix{}, Matrix{});
  const int64_t rank = down.value().ndim() == 2 ? down.value().size(0) : 0;
  TVM_FFI_CHECK(rank > 0, ValueError) << "down must be [rank, " << to.in << "]";
  const Dtype dtype = stack->k->dtype;
  adapt(to, weight(*down, "down", dtype, rank, to.in), weight(*up, "up", dtype, to.out, rank));
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(decoder_stack, stack_new);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(decoder_stack_bytes, stack_bytes);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(decoder_stack_norms, stack_norms);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(decoder_stack_pack, stack_pack);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(decoder_stack_adapt, stack_adapt);

}  // namespace appo

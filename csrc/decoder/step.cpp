// One forward pass: checks what Python hands over, exports the function. See forward.h.

#include <tvm/ffi/function.h>

#include "decoder/forward.h"
#include "decoder/stack.h"
#include "segment_attention/tables.h"

namespace appo {
namespace {

const int64_t* indices(const Tensor& t, const char* name, int64_t size, int64_t end) {
  check_vector(t, name, kDLInt, 64, size);
  const auto* at = data<const int64_t>(t);
  for (int64_t i = 0; i < size; ++i) {
    TVM_FFI_CHECK(at[i] >= 0 && at[i] < end, ValueError)
        << name << "[" << i << "] is " << at[i] << ", expected 0 … " << end - 1;
  }
  return at;
}

int64_t length(const Tensor& t, const char* name) {
  TVM_FFI_CHECK(t.ndim() == 1, ValueError) << name << " must have 1 dimension, has " << t.ndim();
  return t.size(0);
}

// embed[vocab, hidden] and turn[context, dim/2, 2] as in appo/rollout/native/model/model.py; slots …
// addresses are the tables of attention; out[rows of out_rows, or all][hidden] float32 or numbers.
void step(Stack stack, Tensor embed, Tensor turn, Tensor norm, Tensor ids, Tensor positions,
          Tensor slots, Tensor segments, Tensor blocks, Tensor reads, Tensor limits,
          Tensor addresses, MaybeTensor out_rows, Tensor out, int64_t threads) {
  const LayerShape& s = stack->shape;
  const LayerKernels& k = *stack->k;
  ForwardProblem p{};
  p.k = &k;
  p.shape = s;
  p.layers = &stack->layers;
  p.norm = floats(norm, "norm", 1, s.hidden);
  p.embed = block(embed, "embed", k.dtype, embed.size(0), s.hidden);
  p.turn = floats(turn, "turn", turn.size(0), s.head_dim);
  p.rows = length(ids, "ids");
  p.ids = indices(ids, "ids", p.rows, embed.size(0));
  p.positions = indices(positions, "positions", p.rows, turn.size(0));
  p.all = !out_rows.has_value();
  p.chosen_count = p.rows;
  if (!p.all) {
    p.chosen_count = length(*out_rows, "out_rows");
    p.chosen = indices(*out_rows, "out_rows", p.chosen_count, p.rows);
  }
  p.dtype = out.dtype().bits == 32 ? Dtype::f32 : k.dtype;
  p.out = block(out, "out", p.dtype, p.chosen_count, s.hidden);
  const auto layers = static_cast<int64_t>(stack->layers.size());
  const AttentionShape shape{k.dtype, p.rows, s.heads, s.kv_heads, s.head_dim, layers};
  p.attention = attention_problem(shape, {slots, segments, blocks, reads, limits, addresses},
                                  stack->isa, threads);
  p.threads = threads;
  if (p.rows > 0) layer_forward(p);
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(decoder_step, step);

}  // namespace appo

// The output head, a packed weight of its own: logits, or tokens sampled from them tile by tile.

#include <tvm/ffi/function.h>
#include <tvm/ffi/object.h>

#include "decoder/checks.h"
#include "sampling/checks.h"

namespace appo {
namespace {

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
      << "the head is [" << vocab << ", " << hidden
      << "]; expected at least one row and an even number of columns";
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

// Rows of hidden states as the head takes them: its numbers, or float32 beside bfloat16 weights.
struct Hidden {
  Rows rows;
  int64_t count;
  bool of_floats;
};

Hidden hidden_of(const HeadObj& head, const Tensor& hidden) {
  const bool of_floats = head.k->dtype == Dtype::bf16 && hidden.dtype().bits == 32;
  const Dtype dtype = of_floats ? Dtype::f32 : head.k->dtype;
  const int64_t rows = rows_of(hidden), columns = head.w.in;
  const char* from = block(hidden, "hidden", dtype, rows, columns);
  return {{reinterpret_cast<const float*>(from), columns * bytes_of(dtype) / 4}, rows, of_floats};
}

void head_logits(Head head, Tensor hidden, Tensor out, int64_t threads) {
  const Hidden h = hidden_of(*head.get(), hidden);
  auto* to = reinterpret_cast<float*>(block(out, "out", Dtype::f32, h.count, head->w.out));
  logits(*head->k, head->w, h.of_floats, h.rows, h.count, to, threads);
}

// Samples a token per row of `hidden`; for seeds … entropy see sampling/checks.h. The logits are
// those of head_logits, bit for bit, and only ever a tile of them exists.
void head_sample(Head head, Tensor hidden, Tensor seeds, Tensor positions, Tensor inv_temp,
                 Tensor greedy, Tensor tokens, Tensor logp, Tensor entropy, int64_t threads) {
  const Hidden h = hidden_of(*head.get(), hidden);
  const Packed& w = head->w;
  const int64_t panel = head->k->linear->panel;
  const auto product = h.of_floats ? head->k->product_of_floats : head->k->product;
  const auto tile = [&](int64_t first, int64_t columns, int64_t row, int64_t rows, float* to) {
    for (int64_t j = 0; j < columns; j += panel) {
      const int64_t p = (first + j) / panel;
      product(rows, w.count(p), w.words(), h.rows.data + row * h.rows.stride, h.rows.stride,
              w.data + p * w.panel_words(), to + j, kTile);
    }
    return static_cast<const float*>(to);
  };
  sample_rows(sample_kernels_for(head->k->linear->lanes == 16 ? "avx512" : "avx2"),
              params_of(seeds, positions, inv_temp, greedy, h.count), w.out,
              useful_threads(w, h.count, threads), tile,
              sampled_into(tokens, logp, entropy, h.count));
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(decoder_head, head_new);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(decoder_head_bytes, head_bytes);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(decoder_head_pack, head_pack);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(decoder_head_logits, head_logits);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(decoder_head_sample, head_sample);

}  // namespace appo

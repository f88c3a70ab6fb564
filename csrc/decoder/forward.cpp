// See forward.h.

#include "decoder/forward.h"

#include <cstring>
#include <utility>

namespace appo {
namespace {

// What the layers hand on, for all rows at once. A few kilobytes per row: it stays in the caches at
// decode sizes.
struct Flow {
  Flow(const LayerShape& s, Dtype dtype, int64_t rows)
      : size(bytes_of(dtype)),
        width(s.heads * s.head_dim),
        kv_width(s.kv_heads * s.head_dim),
        x(rows * s.hidden),
        q(words(rows * width)),
        k(words(rows * kv_width)),
        v(words(rows * kv_width)),
        attended(words(rows * width)) {}
  int64_t words(int64_t numbers) const { return ceil_div(numbers * size, 4); }

  int64_t size, width, kv_width;  // bytes per number, numbers per row of q and of k and v
  Scratch x, q, k, v, attended;
};

char* bytes(const Scratch& s) { return reinterpret_cast<char*>(s.get()); }

void gather(const char* from, int64_t row_bytes, const int64_t* rows, int64_t count, char* to) {
  for (int64_t i = 0; i < count; ++i) {
    std::memcpy(to + i * row_bytes, from + rows[i] * row_bytes, static_cast<size_t>(row_bytes));
  }
}

// Nothing reads the other rows once the last layer has attended.
void keep_chosen(const ForwardProblem& p, Flow& f) {
  Scratch x(p.chosen_count * p.shape.hidden), attended(f.words(p.chosen_count * f.width));
  gather(bytes(f.x), p.shape.hidden * 4, p.chosen, p.chosen_count, bytes(x));
  gather(bytes(f.attended), f.width * f.size, p.chosen, p.chosen_count, bytes(attended));
  f.x = std::move(x);
  f.attended = std::move(attended);
}

}  // namespace

void layer_forward(const ForwardProblem& p) {
  const LayerShape& s = p.shape;
  Flow f(s, p.k->dtype, p.rows);
  for (int64_t i = 0; i < p.rows; ++i) {
    p.k->widen(p.embed + p.ids[i] * s.hidden * f.size, s.hidden, f.x.get() + i * s.hidden);
  }

  AttentionProblem attend = p.attention;
  attend.q = bytes(f.q);
  attend.k = bytes(f.k);
  attend.v = bytes(f.v);
  attend.out = bytes(f.attended);
  attend.q_stride = attend.out_stride = f.width;
  attend.k_stride = attend.v_stride = f.kv_width;

  int64_t rows = p.rows;
  const int64_t last = static_cast<int64_t>(p.layers->size()) - 1;
  for (int64_t i = 0; i <= last; ++i) {
    const LayerWeights& w = (*p.layers)[i];
    layer_qkv(*p.k, s, w, rows, f.x.get(), p.turn, p.positions, bytes(f.q), bytes(f.k), bytes(f.v),
              p.threads);
    attend.layer = i;
    attention(attend);
    if (i == last && !p.all) {
      keep_chosen(p, f);
      rows = p.chosen_count;
    }
    if (rows > 0) layer_mlp(*p.k, s, w, rows, bytes(f.attended), f.x.get(), p.threads);
  }

  const auto norm = p.dtype == p.k->dtype ? p.k->norm : p.k->norm_to_floats;
  for (int64_t i = 0; i < rows; ++i) {
    norm(f.x.get() + i * s.hidden, p.norm, s.hidden, s.eps, s.hidden,
         p.out + i * s.hidden * bytes_of(p.dtype));
  }
}

}  // namespace appo

// Attention over lists of KV segments on a CPU: what its parts share. Compiled with wide instructions too: nothing here
// may become an external symbol (see linear.h).
//
//   attention.cpp        checks what Python hands over, exports the function
//   attention_work.cpp   the order of the work, threads, scratch memory
//   attention_rows.h     the softmax step of one row, a template that attention_<isa>.cpp compile
//
// The products and their packing are those of the fused head (linear_product.h): a block of keys becomes panels of words
// along the head dimension, a block of values words along the keys, once for all query rows that share them.
//
// A row's bits depend on its query and its own list of (segment, count) alone: every segment is cut into blocks of
// kKeys from its own start, a row's statistics absorb these blocks one after another, and each product is a sum in a
// fixed order whatever rows stand beside it. So grouping rows, tiles and threads change the time, never a result.
#pragma once

#include <cstdint>

#include "linear.h"

namespace appo {

constexpr int64_t kKeys = 128;     // keys per block
constexpr int64_t kTileRows = 64;  // query rows (row x head of the group) that share a packed block
constexpr int64_t kMostDim = 256;  // head dimension: products longer than 256 words are cut (linear_product.h)

// Keys and values of `capacity` positions: element (layer, head, position, d) of K lies at
// layer·layer_stride + head·head_stride + position·token_stride + d, in elements; V the same, `values` further on.
struct Segment {
  const char* data;
  int64_t layer_stride, values, head_stride, token_stride, capacity;
};

// Rows a … b-1 read the first limits[i - a] positions of a segment (0: row i does not read it). A row's reads are listed
// in the order of its path.
struct Read {
  int64_t segment, a, b, limits;
};

// Row `row` of k and v becomes position `position` of a segment before anything is read.
struct Write {
  int64_t row, segment, position;
};

struct AttentionKernels {
  // One row meets n keys: state (m, l) and o[dim] absorb the scores s[n] (any padding up to 16 is ignored); what is to
  // be multiplied with the values goes to p, zero from n to the next multiple of 16.
  void (*absorb)(const float* s, int64_t n, float scale2, float* state, float* o, int64_t dim, void* p);
};

struct AttentionProblem {
  Dtype dtype;
  int64_t rows, heads, kv_heads, dim, layer;
  const char *q, *k, *v;  // [rows][heads][dim]; rows are q_stride, k_stride, v_stride elements apart
  int64_t q_stride, k_stride, v_stride;
  char* out;  // [rows][heads][dim]
  const Segment* segments;
  const Read* reads;
  const Write* writes;
  const int64_t* limits;
  int64_t read_count, write_count, tile_rows, threads;
  const LinearKernels* products;
  const AttentionKernels* rows_of;
};

void attention(const AttentionProblem& p);

const AttentionKernels& attention_avx512_bf16();
const AttentionKernels& attention_avx512();
const AttentionKernels& attention_avx2();

}  // namespace appo

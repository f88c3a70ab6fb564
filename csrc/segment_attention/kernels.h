// A strip of query rows meets a chunk of keys: scores, softmax step, values, all in the first
// cache. Over a vector type V and a Step (product.h); kernels_<isa>.cpp compile it into a table.
//
// All of it is in unnamed namespaces and calls no function template of the standard library (see
// common/simd/kernels.h).
#pragma once

#include "segment_attention/product.h"
#include "segment_attention/rows.h"

namespace appo {
namespace {

template <class V, class Step, int M>
void scores_of(const Strip& s, int64_t block, int64_t count) {
  if constexpr (V::columns * V::lanes == 4 * kBlock) {
    if (count == 4) return scores<V, Step, M, 4>(s, block);
    if (count == 3) return scores<V, Step, M, 3>(s, block);
    if (count == 2) return scores<V, Step, M, 2>(s, block);
  }
  scores<V, Step, M, 1>(s, block);
}

template <class V, class Step, int M>
void values_of(const Strip& s, const float* shrink, int64_t column, int64_t count) {
  if constexpr (V::columns == 4) {
    if (count == 4) return values<V, Step, M, 4>(s, shrink, column);
    if (count == 3) return values<V, Step, M, 3>(s, shrink, column);
  }
  if (count == 2) return values<V, Step, M, 2>(s, shrink, column);
  values<V, Step, M, 1>(s, shrink, column);
}

// body(first, count) for pieces of nearly equal size, at most `most` items each.
template <class Body>
inline __attribute__((always_inline)) void in_pieces(int64_t items, int64_t most,
                                                     const Body& body) {
  const int64_t pieces = (items + most - 1) / most;
  for (int64_t i = 0, first = 0; i < pieces; ++i) {
    const int64_t next = items * (i + 1) / pieces;
    body(first, next - first);
    first = next;
  }
}

template <class V, class Step, int M>
void meet_rows(const Strip& s) {
  int64_t most = 0;
  for (int i = 0; i < M; ++i) most = most > s.seen[i] ? most : s.seen[i];
  in_pieces((most + kBlock - 1) / kBlock, V::columns * V::lanes / kBlock,
            [&](int64_t block, int64_t count) { scores_of<V, Step, M>(s, block, count); });
  float shrink[M];
  for (int i = 0; i < M; ++i) {
    shrink[i] = absorb<V, Step::round>(s.scores + i * kChunk, s.seen[i], s.scale2, s.state + 2 * i,
                                       s.weights + i * kChunk);
  }
  in_pieces((s.dim + V::lanes - 1) / V::lanes, V::columns, [&](int64_t first, int64_t count) {
    values_of<V, Step, M>(s, shrink, first * V::lanes, count);
  });
}

template <class V, class Step>
void meet(const Strip& s) {
  switch (s.rows) {
    case 1:
      return meet_rows<V, Step, 1>(s);
    case 2:
      return meet_rows<V, Step, 2>(s);
    case 3:
      return meet_rows<V, Step, 3>(s);
    case 4:
      return meet_rows<V, Step, 4>(s);
    case 5:
      return meet_rows<V, Step, 5>(s);
    default:
      return meet_rows<V, Step, 6>(s);
  }
}

}  // namespace
}  // namespace appo

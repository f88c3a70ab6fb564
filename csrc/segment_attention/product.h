// The two products of attention, over a vector type V and a Step: what is done with a word of a
// block. Keys and values are read where they lie (see segment_attention.h for their order).
#pragma once

#include "common/simd/product.h"
#include "segment_attention/segment_attention.h"

namespace appo {
namespace {

// Two bf16 numbers at once, …
template <class V, class Dot>
struct Words {
  static constexpr int64_t pair = 2, halves = 1;
  static constexpr bool round = true;  // weights are rounded to bf16
  static typename V::F right(const float* b, int) { return V::load(b); }
  static typename V::F first(const float* b) {
    return V::low_word(b);
  }  // the first number of each word alone
  static typename V::F dot(typename V::F c, typename V::F a, typename V::F b) {
    return Dot::dot(c, a, b);
  }
};

// … each of the two as a float with a float, …
template <class V>
struct Halves {
  static constexpr int64_t pair = 2, halves = 2;
  static constexpr bool round = false;
  static typename V::F right(const float* b, int half) {
    return half ? V::high_float(b) : V::low_float(b);
  }
  static typename V::F first(const float* b) { return V::low_float(b); }
  static typename V::F dot(typename V::F c, typename V::F a, typename V::F b) {
    return V::fma(a, b, c);
  }
};

// … or one float.
template <class V>
struct Floats {
  static constexpr int64_t pair = 1, halves = 1;
  static constexpr bool round = false;
  static typename V::F right(const float* b, int) { return V::load(b); }
  static typename V::F dot(typename V::F c, typename V::F a, typename V::F b) {
    return V::fma(a, b, c);
  }
};

// Blocks lie far apart, and what the processor fetches by itself ends with each. So while a block
// is worked on the same place of a block to come is asked for. `column`: a constant, in floats;
// lines of memory hold 16.
inline __attribute__((always_inline)) void ask_for(const float* place, int64_t column) {
  if (column % 16 == 0) __builtin_prefetch(place + column, 0, 2);
}

// scores[M][N blocks] of a strip: sums over the words of the head dimension.
template <class V, class Step, int M, int N>
void scores(const Strip& s, int64_t block) {
  constexpr int per = kBlock / V::lanes, columns = N * per;
  typename V::F sum[M][columns];
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < columns; ++j) sum[i][j] = V::set(0.0f);
  }
  const float *keys[N], *ahead[N], *q = s.q;
#pragma GCC unroll 4
  for (int j = 0; j < N; ++j) {
    keys[j] = s.blocks[block + j] + s.keys;
    ahead[j] = s.ahead[block + j] + s.keys;
  }
  for (int64_t at = 0; at < kBlock * s.dim / Step::pair; at += kBlock) {
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) ask_for(ahead[j] + at, 0);
#pragma GCC unroll 2
    for (int half = 0; half < Step::halves; ++half) {
      typename V::F right[columns];
#pragma GCC unroll 4
      for (int j = 0; j < columns; ++j)
        right[j] = Step::right(keys[j / per] + at + j % per * V::lanes, half);
#pragma GCC unroll 8
      for (int i = 0; i < M; ++i) {
        const auto left = V::broadcast(q + i * s.q_stride + half);
#pragma GCC unroll 4
        for (int j = 0; j < columns; ++j) sum[i][j] = Step::dot(sum[i][j], left, right[j]);
      }
    }
    q += Step::halves;
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < columns; ++j)
      V::store(s.scores + i * kChunk + block * kBlock + j * V::lanes, sum[i][j]);
  }
}

// sums = sums · shrink + weights · values for N vectors of the head dimension, from `column` on.
// Each row's chain of additions ends with the last key that it reads: the words that all rows read
// are taken together, then every row goes on alone, so that what another row may see, which need
// not be a number, is never multiplied for it.
template <class V, class Step, int M, int N>
void values(const Strip& s, const float* shrink, int64_t column) {
  constexpr int64_t words = kBlock / Step::pair;
  typename V::F sum[M][N];
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) sum[i][j] = V::set(0.0f);
  }
  int64_t all = s.seen[0];
  for (int i = 1; i < M; ++i) all = all < s.seen[i] ? all : s.seen[i];
  all /= Step::pair;

  const float* weights = s.weights;
  for (int64_t k = 0; k < all;) {
    const float *v = s.blocks[k / words] + s.values + column,
                *ahead = s.ahead[k / words] + s.values + column;
    for (int64_t end = all < k + words ? all : k + words; k < end;
         ++k, v += s.dim, ahead += s.dim) {
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) ask_for(ahead, j * V::lanes);
#pragma GCC unroll 2
      for (int half = 0; half < Step::halves; ++half) {
        typename V::F right[N];
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) right[j] = Step::right(v + j * V::lanes, half);
#pragma GCC unroll 8
        for (int i = 0; i < M; ++i) {
          const auto left = V::broadcast(weights + i * kChunk + half);
#pragma GCC unroll 4
          for (int j = 0; j < N; ++j) sum[i][j] = Step::dot(sum[i][j], left, right[j]);
        }
      }
      weights += Step::halves;
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) {
    const float* left = s.weights + i * kChunk + all * Step::halves;
    for (int64_t key = all * Step::pair; key < s.seen[i]; key += Step::pair, left += Step::halves) {
      const float* v =
          s.blocks[key / kBlock] + s.values + key % kBlock / Step::pair * s.dim + column;
      if constexpr (Step::pair == 2) {
        if (key + 1 == s.seen[i]) {  // the word's other key is not this row's to read
#pragma GCC unroll 4
          for (int j = 0; j < N; ++j) {
            sum[i][j] = Step::dot(sum[i][j], V::broadcast(left), Step::first(v + j * V::lanes));
          }
          break;
        }
      }
#pragma GCC unroll 2
      for (int half = 0; half < Step::halves; ++half) {
        const auto weight = V::broadcast(left + half);
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j)
          sum[i][j] = Step::dot(sum[i][j], weight, Step::right(v + j * V::lanes, half));
      }
    }
    const auto by = V::set(shrink[i]);
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) {
      float* to = s.sums + i * s.sum_stride + column + j * V::lanes;
      V::store(to, V::fma(V::load(to), by, sum[i][j]));
    }
  }
}

}  // namespace
}  // namespace appo

// Few rows against a panel that comes from memory, over a vector type V. See kernels.h.
//
// At 1 to 16 rows the weights are read once and little is computed with each, so memory must never
// rest. Hardware fetches ahead only while a stream is being read; the second group of rows reads
// what the first has brought into L2, and meanwhile memory would be idle. So every group asks for
// its share of the piece that follows in memory. One group alone asks for what comes next in its
// own stream: further ahead it would disturb the hardware (10.3 against 7.1 ms for the layers of
// SmolLM2-135M at one row on Zen 4, which is 30 GB/s, what a plain sum of the same memory reads).
#pragma once

#include "decoder/decoder.h"

namespace appo {
namespace {

// What one step does with a word of the panel: multiply it as it is, …
template <class V>
struct Whole {
  static constexpr int64_t halves = 1;
  static typename V::F right(const float* b, int) { return V::load(b); }
  static typename V::F dot(typename V::F c, typename V::F a, typename V::F b) {
    return V::Dot::dot(c, a, b);
  }
};

// … or each of its two bf16 numbers as a float with a float: a shift or a mask makes it one. The
// product has the accuracy of float32 and reads half the bytes that a float32 copy of the weights
// would have.
template <class V>
struct Halves {
  static constexpr int64_t halves = 2;
  static typename V::F right(const float* b, int half) { return V::half_word(b, half); }
  static typename V::F dot(typename V::F c, typename V::F a, typename V::F b) {
    return V::fma(a, b, c);
  }
};

struct Piece {
  int64_t words;
  const float* panel;
  int64_t ahead;                 // how far away, in floats, lies what is fetched now:
  int64_t first_line, end_line;  // these lines of every word row
};

// c[M][N·lanes] (+)= a · a piece of a panel. Rows of a are `row` floats apart.
template <class V, class Step, int M, int N>
void stream_rows(const Piece& piece, const float* a, int64_t row, float* c, int64_t ldc, bool add) {
  constexpr int64_t panel = V::lanes * V::columns, line = 16;
  typename V::F sum[M][N];
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) sum[i][j] = V::set(0.0f);
  }
  const float* b = piece.panel;
  for (int64_t k = 0; k < piece.words; ++k) {
    for (int64_t l = piece.first_line; l < piece.end_line; ++l)
      __builtin_prefetch(b + piece.ahead + l * line, 0, 2);
#pragma GCC unroll 2
    for (int half = 0; half < Step::halves; ++half) {
      typename V::F right[N];
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) right[j] = Step::right(b + j * V::lanes, half);
#pragma GCC unroll 8
      for (int i = 0; i < M; ++i) {
        const auto left = V::broadcast(a + i * row + half);
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) sum[i][j] = Step::dot(sum[i][j], left, right[j]);
      }
    }
    a += Step::halves;
    b += panel;
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) {
      float* to = c + i * ldc + j * V::lanes;
      V::store(to, add ? V::add(V::load(to), sum[i][j]) : sum[i][j]);
    }
  }
}

using StreamRows = void (*)(const Piece&, const float*, int64_t, float*, int64_t, bool);

template <class V, class Step, int M>
StreamRows stream_rows_for(int64_t vectors) {
  if constexpr (V::columns == 4) {
    if (vectors == 4) return stream_rows<V, Step, M, 4>;
    if (vectors == 3) return stream_rows<V, Step, M, 3>;
  }
  return vectors == 2 ? stream_rows<V, Step, M, 2> : stream_rows<V, Step, M, 1>;
}

template <class V, class Step>
StreamRows stream_rows_for(int64_t rows, int64_t vectors) {
  switch (rows) {
    case 1:
      return stream_rows_for<V, Step, 1>(vectors);
    case 2:
      return stream_rows_for<V, Step, 2>(vectors);
    case 3:
      return stream_rows_for<V, Step, 3>(vectors);
    case 4:
      return stream_rows_for<V, Step, 4>(vectors);
    case 5:
      return stream_rows_for<V, Step, 5>(vectors);
    default:
      return stream_rows_for<V, Step, 6>(vectors);
  }
}

// c[rows][columns] = a · one panel. The sums of a row are taken in the same order whatever rows
// stand beside it.
template <class V, class Step>
void stream(int64_t rows, int64_t columns, int64_t words, const float* a, int64_t row,
            const float* panel, float* c, int64_t ldc) {
  constexpr int64_t width = V::lanes * V::columns, lines = width / 16, height = 6, depth = 320,
                    near = 192;
  const int64_t vectors = (columns + V::lanes - 1) / V::lanes,
                groups = (rows + height - 1) / height;
  const int64_t pieces = (words + depth - 1) / depth, step = (words + pieces - 1) / pieces;
  for (int64_t k = 0; k < words; k += step) {
    const int64_t some = words - k < step ? words - k : step,
                  ahead = groups == 1 ? near : some * width;
    for (int64_t g = 0, i = 0; g < groups; ++g) {  // groups of nearly equal height
      const int64_t next = rows * (g + 1) / groups;
      const Piece piece{some, panel + k * width, ahead, lines * g / groups,
                        lines * (g + 1) / groups};
      const float* left = a + i * row + k * Step::halves;
      stream_rows_for<V, Step>(next - i, vectors)(piece, left, row, c + i * ldc, ldc, k > 0);
      i = next;
    }
  }
}

}  // namespace
}  // namespace appo

// Packing, and the one matrix product, over a vector type V and a word product Dot. See kernels.h.
#pragma once

#include <cstring>

#include "common/matrix.h"

namespace appo {
namespace {

template <class V>
struct FloatDot {
  using Number = float;
  static constexpr int64_t pair = 1;
  static typename V::F dot(typename V::F c, typename V::F a, typename V::F b) {
    return V::fma(a, b, c);
  }
};

template <class V, class Dot>
void fetch(const Matrix& a, int64_t i, int64_t width, void* to) {
  auto* out = static_cast<typename Dot::Number*>(to);
  const char* row = row_of(a, i);
  const int64_t size = bytes_of(a.dtype), step = a.column_stride * size;
  for (int64_t j = 0; j < width; j += V::lanes) {
    alignas(64) char few[V::lanes * 4];
    const char* from = row + j * size;
    if (a.column_stride != 1 || j + V::lanes > a.columns) {  // a strided row, or the end of one
      std::memset(few, 0, sizeof few);
      for (int64_t l = 0; l < V::lanes && j + l < a.columns; ++l)
        std::memcpy(few + l * size, row + (j + l) * step, size);
      from = few;
    }
    if (Dot::pair == 2) {
      std::memcpy(out + j, from, V::lanes * 2);
    } else {
      V::store(reinterpret_cast<float*>(out) + j, V::widen(from, a.dtype));
    }
  }
}

template <class V, class Dot>
void pack_across(const Matrix& a, int64_t first, int64_t count, int64_t width, void* stage,
                 float* out) {
  using Number = typename Dot::Number;
  const int64_t words = width / Dot::pair;
  const bool as_it_is = a.dtype == (Dot::pair == 2 ? Dtype::bf16 : Dtype::f32) &&
                        a.column_stride == 1 && width == a.columns;
  for (int64_t g = 0; g < V::lanes * V::columns; g += V::lanes) {
    const float* rows[V::lanes];
    for (int64_t l = 0; l < V::lanes; ++l) {
      Number* staged = static_cast<Number*>(stage) + l * width;
      if (g + l < count && as_it_is) {
        rows[l] = reinterpret_cast<const float*>(row_of(a, first + g + l));
        continue;
      }
      if (g + l < count) {
        fetch<V, Dot>(a, first + g + l, width, staged);
      } else {
        std::memset(staged, 0, width * sizeof(Number));
      }
      rows[l] = reinterpret_cast<const float*>(staged);
    }
    for (int64_t k = 0; k < words; k += V::lanes) {
      V::transpose(rows, k, out + k * V::lanes * V::columns + g, V::lanes * V::columns);
    }
  }
}

template <class V, class Dot>
void pack_along(const void* row0, const void* row1, int64_t width, float* out, int64_t stride) {
  constexpr int64_t panel = V::lanes * V::columns;
  for (int64_t j = 0; j < width; j += V::lanes) {
    float* to = out + j / panel * stride + j % panel;
    if constexpr (Dot::pair == 2) {
      V::store(to, V::words(static_cast<const uint16_t*>(row0) + j,
                            static_cast<const uint16_t*>(row1) + j));
    } else {
      V::store(to, V::load(static_cast<const float*>(row0) + j));
    }
  }
}

// M x N·lanes sums in registers, added to c at the end: short sums first lose less than one long
// one (a fifth of the error at 4,096 terms).
template <class V, class Dot, int M, int N>
void micro(int64_t words, const float* a, int64_t row, int64_t step, const float* b, float* c,
           int64_t ldc, bool add) {
  typename V::F sum[M][N];
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) sum[i][j] = V::set(0.0f);
  }
  for (int64_t k = 0; k < words; ++k) {
    typename V::F right[N];
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) right[j] = V::load(b + j * V::lanes);
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      const auto left = V::broadcast(a + i * row);
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) sum[i][j] = Dot::dot(sum[i][j], left, right[j]);
    }
    a += step;
    b += V::lanes * V::columns;
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

using Micro = void (*)(int64_t, const float*, int64_t, int64_t, const float*, float*, int64_t,
                       bool);

template <class V, class Dot, int M>
Micro micro_of(int64_t vectors) {
  if constexpr (V::columns == 4) {
    if (vectors == 4) return micro<V, Dot, M, 4>;
    if (vectors == 3) return micro<V, Dot, M, 3>;
  }
  return vectors == 2 ? micro<V, Dot, M, 2> : micro<V, Dot, M, 1>;
}

template <class V, class Dot>
Micro micro_of(int64_t rows, int64_t vectors) {
  switch (rows) {
    case 1:
      return micro_of<V, Dot, 1>(vectors);
    case 2:
      return micro_of<V, Dot, 2>(vectors);
    case 3:
      return micro_of<V, Dot, 3>(vectors);
    case 4:
      return micro_of<V, Dot, 4>(vectors);
    case 5:
      return micro_of<V, Dot, 5>(vectors);
    default:
      return micro_of<V, Dot, 6>(vectors);
  }
}

template <class V, class Dot>
void product(int64_t rows, int64_t columns, int64_t words, const float* a, int64_t row,
             int64_t step, const float* b, int64_t stride, float* c, int64_t ldc, bool add) {
  constexpr int64_t panel = V::lanes * V::columns, height = 6,
                    depth = 256;  // depth x panel words: 128 KiB of L2
  for (int64_t j = 0; j < columns; j += panel) {
    const int64_t vectors =
        columns - j < panel ? (columns - j + V::lanes - 1) / V::lanes : V::columns;
    const Micro whole = micro_of<V, Dot>(height, vectors),
                rest = micro_of<V, Dot>(rows % height, vectors);
    for (int64_t k = 0; k < words; k += depth) {
      const int64_t some = words - k < depth ? words - k : depth;
      const float* right = b + j / panel * stride + k * panel;
      int64_t i = 0;
      for (; i + height <= rows; i += height) {
        whole(some, a + i * row + k * step, row, step, right, c + i * ldc + j, ldc, add || k > 0);
      }
      if (i < rows)
        rest(some, a + i * row + k * step, row, step, right, c + i * ldc + j, ldc, add || k > 0);
    }
  }
}

}  // namespace
}  // namespace appo

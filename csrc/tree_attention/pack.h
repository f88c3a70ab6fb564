// Rows of heads on their way into what the products take. See tree_attention.h.
#pragma once

#include <algorithm>
#include <cstring>

#include "tree_attention/problem.h"

namespace appo {

inline bool finite(const char* row, Dtype dtype, int64_t n) {
  bool hurt = false;
  if (dtype == Dtype::f32) {
    const auto* x = reinterpret_cast<const uint32_t*>(row);
    for (int64_t i = 0; i < n; ++i) hurt |= (x[i] & 0x7f800000u) == 0x7f800000u;
  } else {
    const auto* x = reinterpret_cast<const uint16_t*>(row);
    const uint16_t exponent = dtype == Dtype::bf16 ? 0x7f80 : 0x7c00;
    for (int64_t i = 0; i < n; ++i) hurt |= (x[i] & exponent) == exponent;
  }
  return !hurt;
}

// Tokens first … first+count-1 of `group` heads become rows of `width` numbers, heads of a token
// side by side; rows that are not finite become zeros and hurt[row] NaN.
inline void fetch_rows(const TreeProblem& p, const TreeSizes& s, const Heads& x, int64_t first,
                       int64_t count, int64_t head, int64_t group, float* rows, float* hurt) {
  for (int64_t i = 0; i < count * group; ++i) {
    const char* from = head_row(p, x, first + i / group, head + i % group);
    float* to = rows + i * s.row;
    if (finite(from, p.dtype, p.dim)) {
      p.products->fetch(Matrix{from, p.dtype, p.dim, 0, 1, nullptr}, 0, s.width, to);
    } else {
      std::memset(to, 0, static_cast<size_t>(s.row) * 4);
      hurt[i] = __builtin_nanf("");
    }
  }
}

// Panels [words of a head][panel of rows]: the right factor of a product summed along the head.
// `count` fetched rows.
inline void rows_across(const TreeProblem& p, const TreeSizes& s, const float* rows, int64_t count,
                        float* stage, float* out) {
  const Matrix m{reinterpret_cast<const char*>(rows),
                 s.pair == 2 ? Dtype::bf16 : Dtype::f32,
                 s.width,
                 s.width,
                 1,
                 nullptr};
  for (int64_t j = 0; j < count; j += s.panel) {
    p.products->pack_across(m, j, std::min(s.panel, count - j), s.width, stage, out + j * s.row);
  }
}

// Panels [words along the rows][panel of a head], `stride` words apart. An odd last row is paired
// with zeros.
inline void rows_along(const TreeProblem& p, const TreeSizes& s, const float* rows, int64_t count,
                       int64_t stride, float* out) {
  alignas(64) static const float zeros[kTreeDim] = {};
  for (int64_t i = 0; i < count; i += s.pair) {
    const float* other = i + 1 < count ? rows + (i + 1) * s.row : zeros;
    p.products->pack_along(rows + i * s.row, other, s.sum, out + i / s.pair * s.panel, stride);
  }
}

}  // namespace appo

// New keys and values into their blocks. See segment_attention.h for the order of a block.

#include <algorithm>
#include <cstring>

#include "common/scratch.h"
#include "common/team.h"
#include "segment_attention/segment_attention.h"

namespace appo {
namespace {

// One head of one row. A key's words lie 16 apart, a value's numbers `pair` apart.
template <typename Number, int64_t pair>
void write_head(const char* key, const char* value, int64_t dim, int64_t position, char* keys,
                char* values) {
  for (int64_t d = 0; d < dim; d += pair) {
    std::memcpy(keys + (d / pair * kBlock + position) * 4, key + d * sizeof(Number), 4);
  }
  const auto* from = reinterpret_cast<const Number*>(value);
  auto* to = reinterpret_cast<Number*>(values) + position / pair * pair * dim + position % pair;
  for (int64_t d = 0; d < dim; ++d) to[d * pair] = from[d];
}

}  // namespace

void write_slots(const AttentionProblem& p) {
  constexpr int64_t rows_per_unit = 32;
  const AttentionShape& shape = p.shape;
  const bool bf16 = shape.dtype == Dtype::bf16;
  const auto write = bf16 ? write_head<uint16_t, 2> : write_head<float, 1>;
  const int64_t size = bytes_of(shape.dtype), values = shape.kv_heads * p.head_bytes();
  // A number takes about a nanosecond; a thread is worth waking for 50 microseconds.
  const int64_t numbers = 2 * shape.rows * shape.kv_heads * shape.dim;
  const int64_t threads = std::clamp<int64_t>(numbers / 50000, 1, p.threads);
  run_team(ceil_div(shape.rows, rows_per_unit), threads, [&](int64_t unit, int64_t) {
    const int64_t end = std::min(shape.rows, (unit + 1) * rows_per_unit);
    for (int64_t i = unit * rows_per_unit; i < end; ++i) {
      if (p.slots[i] < 0) continue;
      for (int64_t head = 0; head < shape.kv_heads; ++head) {
        char* keys = p.block_of(p.slots[i] / kBlock) + head * p.head_bytes();
        write(p.k + (i * p.k_stride + head * shape.dim) * size,
              p.v + (i * p.v_stride + head * shape.dim) * size, shape.dim, p.slots[i] % kBlock,
              keys, keys + values);
      }
    }
  });
}

}  // namespace appo

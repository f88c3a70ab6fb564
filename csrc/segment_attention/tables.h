// What Python hands over for attention, checked once for all layers. See
// appo/rollout/native/attention/segments.py.
#pragma once

#include <tvm/ffi/container/tensor.h>

#include <string>

#include "segment_attention/segment_attention.h"

namespace appo {

// The tables of one batch, int64 on the CPU.
struct AttentionTables {
  tvm::ffi::TensorView slots, segments, blocks, reads, limits;
  tvm::ffi::TensorView addresses;  // of the pool's blocks
};

// Everything but q, k, v, out, their strides and `layer`. Raises ValueError or TypeError, naming
// the table, the entry and what was expected. That `addresses` lead to blocks of this shape is
// taken on trust. isa: "" for the best; threads: an upper bound, fewer are used where there is
// little to do.
AttentionProblem attention_problem(const AttentionShape& shape, const AttentionTables& tables,
                                   const std::string& isa, int64_t threads);

}  // namespace appo

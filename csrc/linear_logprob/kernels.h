// The arithmetic of a row of logits as a table, over a vector type V (common/simd/avx512.h,
// avx2.h), beside the matrix product of that instruction set.
//
// All of it is in unnamed namespaces and calls no function template of the standard library (see
// common/simd/kernels.h).
#pragma once

#include "linear_logprob/rows.h"

namespace appo {
namespace {

template <class V>
constexpr LinearKernels linear_kernels(const MatrixKernels& matrix) {
  return {{matrix}, cap<V>, stats<V>, collapse<V>, grad<V>, grad_cached<V>, slope<V>};
}

}  // namespace
}  // namespace appo

// The arithmetic of the fused head as a table, over a vector type V (common/simd/avx512.h, kernels_avx2.cpp) and a word
// product Dot; the pieces are in common/simd/product.h and rows.h.
//
// All of it is in unnamed namespaces and calls no function template of the standard library: these headers are compiled
// with wide instructions, and a shared symbol could be taken by the linker for code that must run on any machine.
#pragma once

#include "common/simd/product.h"
#include "linear_logprob/rows.h"

namespace appo {
namespace {

template <class V, class Dot>
constexpr LinearKernels kernels() {
  return {Dot::pair,
          V::lanes * V::columns,
          V::lanes,
          fetch<V, Dot>,
          pack_across<V, Dot>,
          pack_along<V, Dot>,
          product<V, Dot>,
          cap<V>,
          stats<V>,
          collapse<V>,
          grad<V>,
          grad_kept<V>,
          slope<V>,
          store<V, Dot>,
          emit<V>};
}

}  // namespace
}  // namespace appo

// The matrix product as a table, over a vector type V (avx512.h, avx2.h) and a word product Dot;
// the pieces are in product.h and rows.h.
//
// All that is compiled with wide instructions, here and in the folders of the operations, is in
// unnamed namespaces and calls no function template of the standard library: a shared symbol could
// be taken by the linker for code that must run on any machine.
#pragma once

#include "common/simd/product.h"
#include "common/simd/rows.h"

namespace appo {
namespace {

template <class V, class Dot>
constexpr MatrixKernels matrix_kernels() {
  return {Dot::pair,       V::lanes * V::columns, V::lanes,
          fetch<V, Dot>,   pack_across<V, Dot>,   pack_along<V, Dot>,
          product<V, Dot>, store<V, Dot>,         emit<V>};
}

}  // namespace
}  // namespace appo

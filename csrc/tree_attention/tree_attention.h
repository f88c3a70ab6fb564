// Attention over a packed tree, forward and backward, on a CPU: what its parts share. Compiled with
// wide instructions too: nothing here may become an external symbol (see common/matrix.h).
//
//   python.cpp    checks what Python hands over, exports the functions
//   problem.h     the checked problem, key blocks, which block is seen by which queries
//   pack.h        rows of heads on their way into what the products take
//   forward.cpp   order of the work, threads, scratch memory
//   backward.cpp  likewise
//   rows.h        softmax and its gradient row by row, templates that kernels_<isa>.cpp compile
//
// Query i sees key j iff j <= i < ends[j]. The products and their packing are those of common/simd.
// Keys are cut into blocks of kTreeKeys at fixed places and a row absorbs them in order, so its
// bits depend neither on threads nor on the queries that share a tile with it.
//
// What is not finite stays with those who see it: such rows are packed as zeros (0 · NaN would
// reach all that share the block), and whoever sees one gets NaN through its softmax.
#pragma once

#include <cstdint>

#include "common/matrix.h"

namespace appo {

constexpr int64_t kTreeKeys = 128;          // keys per block
constexpr int64_t kTreeRows = 128;          // rows (query x head of the group) per tile, about
constexpr int64_t kTreeDim = 256;           // longest head
constexpr int64_t kTreeTokens = 1ll << 24;  // positions are compared as floats

struct TreeKernels {
  // seen[j] for keys first … first+n-1: 0, or hurt[j] (NaN), if `query` sees it, else -1.
  void (*see)(const float* ends, const float* hurt, int64_t first, int64_t n, int64_t query,
              float* seen);
  // One row meets n keys: state (m, l) and o[dim] absorb the scores s[n]; the weights go to p. n is
  // a multiple of 16; seen: null, all of them.
  void (*absorb)(const float* s, const float* seen, int64_t n, float scale2, float* state, float* o,
                 int64_t dim, void* p);
  // s becomes p = 2^(s scale2 - lse2), dp becomes p (dp - delta); both 0 where not seen.
  void (*slope)(float* s, float* dp, const float* seen, int64_t n, float scale2, float lse2,
                float delta);
  float (*dot)(const char* a, const char* b, Dtype dtype, int64_t n);
};

const TreeKernels& tree_avx512_bf16();
const TreeKernels& tree_avx512();
const TreeKernels& tree_avx2();

}  // namespace appo

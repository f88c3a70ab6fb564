// Attention over KV segments in a pool of blocks, on a CPU: what its parts share. Compiled with
// wide instructions too: nothing here may become an external symbol (see common/matrix.h).
//
//   tables.h   checks what Python hands over (python.cpp, which also exports segment_attention)
//   work.cpp   the order of the work, threads, scratch memory
//   write.cpp  new keys and values into their blocks
//   kernels.h  the arithmetic of a few query rows and a chunk of keys, templates that
//              kernels_<isa>.cpp compile into a table
//   product.h  the two products of it
//   rows.h     the softmax step of it
//
// A block holds 16 positions of all layers and heads, [layers][2][kv_heads][16 · dim], keys and
// values in the order in which products take them (`pair` numbers, two of bf16 or one float, make a
// word of 32 bits):
//
//   keys    [dim / pair][16][pair]     a word row: one word of 16 keys, for that word of a query
//   values  [16 / pair][dim][pair]     a word row: `pair` positions, for their weights
//
// So nothing is packed at read time, and a block is read from end to end. What lies behind the
// positions that a row reads, in the same block too, may be anything: it never reaches that row.
//
// A row's bits depend on its query and its own list of (segment, count) alone: every segment is cut
// into chunks of kChunk keys from its own start, a row's statistics absorb these chunks one after
// another, and each product is one chain of additions in a fixed order whatever rows stand beside
// it. So grouping rows, tiles and threads change the time, never a result.
#pragma once

#include <cstdint>

#include "common/matrix.h"

namespace appo {

constexpr int64_t kBlock = 16;   // positions per block
constexpr int64_t kChunk = 128;  // keys between two rescalings of a row's sums
constexpr int64_t kAhead =
    8;  // blocks between those that are worked on and those that are asked for
constexpr int64_t kStrip = 6;  // query rows whose sums are kept in registers
constexpr int64_t kTileRows =
    64;  // query rows (row x head of the group) that meet a chunk while it is in the caches
constexpr int64_t kMostDim = 256;  // head dimension

// Positions 0 … positions-1 of a segment lie in blocks[first], blocks[first + 1], …
struct Segment {
  int64_t first, positions;
};

// Rows a … b-1 read the first limits[i - a] positions of a segment (0: row i does not read it). A
// row's reads are listed in the order of its path.
struct Read {
  int64_t segment, a, b, limits;
};

// Up to kStrip query rows meet a chunk of keys.
struct Strip {
  int64_t rows, dim;
  float scale2;  // log2(e) / sqrt(dim)
  const float*
      q;  // rows of words (or floats, where the products take those), q_stride floats apart
  int64_t q_stride;
  const float* const* blocks;  // of the chunk
  const float* const* ahead;   // as many to come
  int64_t keys, values;        // where those of this head begin in a block, in floats
  int64_t seen[kStrip];        // how many keys of the chunk each row reads: 1 … kChunk
  float* scores;               // [kStrip][kChunk]
  float* weights;              // [kStrip][kChunk]
  float* state;  // [rows] (m, l): the largest score so far (minus infinity: none yet), and the sum
                 // of 2^(score - m)
  float* sums;   // rows of Σ weight · value, sum_stride floats apart
  int64_t sum_stride;
};

struct AttentionKernels {
  const MatrixKernels* linear;  // how queries are fetched and results stored
  void (*meet)(const Strip& s);
};

// What a model layer asks for, the same for all its layers.
struct AttentionShape {
  Dtype dtype;  // of q, k, v, out and the blocks: f32 or bf16
  int64_t rows, heads, kv_heads, dim, layers;
};

// Made by attention_problem (tables.h); q, k, v, out, their strides and `layer` are then set per
// layer.
struct AttentionProblem {
  AttentionShape shape;
  const AttentionKernels* kernels;
  const int64_t* addresses;  // of the blocks of the pool
  const int64_t* blocks;     // numbers of blocks
  const Segment* segments;
  const Read* reads;
  const int64_t* limits;
  const int64_t* slots;  // [rows] block · 16 + position in it where a row's k and v go; -1: nowhere
  int64_t read_count, tile_rows, threads;

  int64_t layer;
  const char *q, *k, *v;                             // [rows][heads or kv_heads][dim]
  char* out;                                         // [rows][heads][dim]
  int64_t q_stride, k_stride, v_stride, out_stride;  // elements from row to row

  // A block's part of the layer: the keys of all heads, then the values of all heads.
  int64_t head_bytes() const { return kBlock * shape.dim * bytes_of(shape.dtype); }
  char* block_of(int64_t block) const {
    return reinterpret_cast<char*>(addresses[block]) + layer * 2 * shape.kv_heads * head_bytes();
  }
};

// Writes k and v into their slots, then attends. Not to be called from a job of run_team.
void attention(const AttentionProblem& p);

void write_slots(const AttentionProblem& p);

// Null: this instruction set has none for that dtype.
const AttentionKernels* attention_avx512_bf16(Dtype dtype);
const AttentionKernels* attention_avx512(Dtype dtype);
const AttentionKernels* attention_avx2(Dtype dtype);

}  // namespace appo

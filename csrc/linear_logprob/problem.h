// The fused output head after the checks, and what forward and backward share: scratch memory, units of work.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>


#include "common/threads.h"
#include "linear_logprob/linear_logprob.h"

namespace appo {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Scratch memory: aligned to cache lines (or to a larger power of two), not initialised.
class Scratch {
 public:
  explicit Scratch(int64_t floats, int64_t align = 64) {
    if (floats <= 0) return;
    data_.reset(static_cast<float*>(std::aligned_alloc(align, static_cast<size_t>(round_up(floats * 4, align)))));
    if (!data_) throw std::bad_alloc();
  }
  float* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  std::unique_ptr<float, Free> data_;
};

// The problem after the checks. `users` cuts the n targets into the rows of h that they belong to: row i has the
// targets users[i] … users[i+1]-1. h.rows lists those rows, each once.
struct LinearProblem {
  const LinearKernels* k;
  Matrix h, w;
  int64_t used_rows, vocab, hidden;
  const int64_t* users;
  const int64_t* column;
  const float* scale;
  float softcap;  // 0: none
  int64_t threads;
  char* kept;  // [n][kKeptHead + kept_tiles · kKeptTile], or null
  int64_t kept_tiles;

  int64_t width() const { return round_up(hidden, 32); }       // numbers per fetched row
  int64_t words() const { return ceil_div(hidden, k->pair); }  // words per fetched row that count
  // Record of a target for the tile at column v, or null.
  char* record(int64_t n, int64_t v) const {
    return v / kTile < kept_tiles ? kept_of(n) + kKeptHead + v / kTile * kKeptTile : nullptr;
  }
  char* kept_of(int64_t n) const { return kept + n * (kKeptHead + kept_tiles * kKeptTile); }
  int64_t row_words() const { return width() / k->pair; }  // words per fetched row in memory
};

void linear_forward(const LinearProblem& p, float* out);  // [4, n]

struct LinearGrads {
  const float *m, *log2s, *constant, *bent, *ga;
  float* dh_f32;      // [T, H], or
  uint16_t* dh_bf16;  // [T, H] with
  uint16_t* dh_low;   // [used rows, H]: the lower halves of the float32 sums
  char* dw;           // [V, H]
  Dtype dw_dtype;
  float* d_scale;  // [n]
};
void linear_backward(const LinearProblem& p, const LinearGrads& g);

// body(unit, part) for every unit, in any order, on at most `threads` threads; part numbers the thread.
template <typename Body>
void run_units(int64_t units, int64_t threads, Body&& body) {
  std::atomic<int64_t> next{0};
  run_parts(std::min(units, threads), [&](int64_t part) {
    for (int64_t unit = next++; unit < units; unit = next++) body(unit, part);
  });
}

}  // namespace appo

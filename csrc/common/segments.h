// What the kernels over packed tokens share: threads over segments, the discounted step, exp, sums
// in a fixed order.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "common/threads.h"

// Functions that are arithmetic on arrays of double: compiled for wider vectors too, the loader
// picks what the processor has. Neither fused nor reordered operations, so every version gives the
// same bits.
#if defined(__x86_64__) && defined(__linux__) && defined(__GLIBC__) && defined(__GNUC__) && \
    !defined(__clang__)
#define APPO_VECTOR __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define APPO_VECTOR
#endif
#if defined(__GNUC__)
#define APPO_INLINE inline __attribute__((always_inline))  // into the wider versions as well
#else
#define APPO_INLINE inline
#endif

namespace appo {

// Below this many tokens per thread, starting a thread costs more than it saves.
constexpr int64_t kTokensPerThread = 1 << 16;

// Calls body(first, last) for ranges of segments with about equally many tokens, one range per
// thread. A segment lies in the range in which its first token lies, so the split depends on the
// offsets alone, not on timing.
template <typename Body>
void for_segments(const int64_t* offsets, int64_t segments, int64_t threads, Body&& body) {
  const int64_t tokens = segments > 0 ? offsets[segments] : 0;
  const int64_t parts = std::clamp<int64_t>(std::min(tokens / kTokensPerThread, segments), 1,
                                            std::max<int64_t>(threads, 1));
  run_parts(parts, [&](int64_t part) {
    const int64_t low = tokens * part / parts;
    const int64_t high = part + 1 == parts ? tokens + 1 : tokens * (part + 1) / parts;
    const int64_t first = std::lower_bound(offsets, offsets + segments, low) - offsets;
    const int64_t last = std::lower_bound(offsets, offsets + segments, high) - offsets;
    if (first < last) body(first, last);
  });
}

// own + gamma * ahead; with gamma 0 what lies ahead does not count even if it is NaN or infinite.
APPO_INLINE double discounted(double own, double ahead, double gamma) {
  return gamma == 0.0 ? own : own + gamma * ahead;
}

// NaN passes through, as it does in torch.clamp.
APPO_INLINE double clip(double x, double low, double high) {
  x = x < low ? low : x;
  return x > high ? high : x;
}

// exp(x) for |x| <= 700 (NaN gives NaN), error about 1 ulp, without branches so that the compiler
// vectorises loops over it: x = n ln2 + r, the Taylor series of degree 13 on |r| <= ln2 / 2
// (remainder 4e-18), times 2^n.
APPO_INLINE double exp_bounded(double x) {
  constexpr double kRound = 0x1.8p52;  // adding it leaves the nearest whole number in the low bits
  const double shifted = x * 0x1.71547652b82fep+0 + kRound;
  const double n = shifted - kRound;
  const double r = (x - n * 0x1.62e42fefa0000p-1) - n * 0x1.cf79abc9e3b3ap-40;
  double p = 1.0 / 6227020800.0;
  p = p * r + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  uint64_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 1023) << 52;
  double power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power;
}

// Sum in eight interleaved lanes, then pairwise: one fixed order, short dependency chains.
template <typename Term>
APPO_INLINE double sum_of(int64_t n, Term&& term) {
  double lane[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    for (int64_t j = 0; j < 8; ++j) lane[j] += term(i + j);
  }
  for (int64_t j = 0; i < n; ++i, ++j) lane[j] += term(i);
  return ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
}

// max(floor, largest term); a NaN term does not count.
template <typename Term>
APPO_INLINE double max_of(int64_t n, double floor, Term&& term) {
  double lane[8] = {floor, floor, floor, floor, floor, floor, floor, floor};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    for (int64_t j = 0; j < 8; ++j) lane[j] = term(i + j) > lane[j] ? term(i + j) : lane[j];
  }
  for (; i < n; ++i) lane[0] = term(i) > lane[0] ? term(i) : lane[0];
  return *std::max_element(lane, lane + 8);
}

}  // namespace appo

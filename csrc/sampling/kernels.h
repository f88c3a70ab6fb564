// A row of logits, many tokens at a time, over a vector type V (see common/simd/avx2.h) that also
// has integers I: ints(v), add, mul, flip (xor), shift<n> (right), ramp (0, 1, 2 …), upper (the
// upper 24 bits as floats) and mask_not_above(a, b): one bit per lane, set where a <= b.
#pragma once

#include "common/simd/math.h"
#include "common/simd/rows.h"
#include "sampling/sampling.h"

namespace appo {
namespace {

// From a Weyl sequence to 32 mixed bits; the shifts and factors are those of C. Wellons' triple32,
// an exhaustively measured mixer. key[1] enters on the way, or streams whose key[0] are close would
// be shifted copies of each other.
template <class V>
inline __attribute__((always_inline)) typename V::I mixed(typename V::I x, typename V::I late) {
  x = V::mul(V::flip(x, V::template shift<17>(x)), V::ints(0xed5ad4bbu));
  x = V::add(x, late);
  x = V::mul(V::flip(x, V::template shift<11>(x)), V::ints(0xac4c1b51u));
  x = V::mul(V::flip(x, V::template shift<15>(x)), V::ints(0x31848babu));
  return V::flip(x, V::template shift<14>(x));
}

constexpr uint32_t kWeyl = 0x9e3779b9u;

template <class V>
typename V::I weyl(const uint32_t* key, int64_t first) {
  const auto ids = V::add(V::ramp(), V::ints(static_cast<uint32_t>(first)));
  return V::add(V::mul(ids, V::ints(kWeyl)), V::ints(key[0]));
}

template <class V>
void hash(const uint32_t* key, int64_t first, int64_t n, uint32_t* out) {
  auto x = weyl<V>(key, first);
  const auto late = V::ints(key[1]), step = V::ints(kWeyl * static_cast<uint32_t>(V::lanes));
  for (int64_t j = 0; j < n; j += V::lanes, x = V::add(x, step))
    V::store_ints(out + j, mixed<V>(x, late));
}

// The first of n logits that equals the largest of them takes the lead if it is larger, or equal
// with a lower id.
inline void lead(const float* x, int64_t n, int64_t first, float top, Race& race) {
  if (!(top > race.x || (top == race.x && first < race.id))) return;
  for (int64_t j = 0; j < n; ++j) {
    if (x[j] == top) {
      race.x = top;
      race.id = first + j;
      return;
    }
  }
}

template <class V>
void absorb(const float* x, int64_t n, int64_t first, const SampleParams& params, RowStats& stats,
            Race& race) {
  const auto low = V::set(kEmpty), zero = V::set(0.0f), factor = V::set(params.scale2);
  auto most = low;
  for_vectors<V>(n, [&](int64_t j, int64_t count) {
    auto v = V::load(x + j);
    if (count < V::lanes) v = V::keep(v, count, low);
    most = V::max(v, most);  // returns the second operand if one is NaN: NaN reaches s, not m
  });
  const float top = V::largest(most);
  auto s = V::load(stats.s), u = V::load(stats.u);
  if (top > stats.m) {
    const auto shift = V::max(low, V::mul(V::set(stats.m - top), factor)), weight = exp2<V>(shift);
    u = V::mul(weight, V::fma(shift, s, u));
    s = V::mul(weight, s);
    stats.m = top;
    if (!params.greedy) sample_aim(params, top, race);
  }
  const auto m = V::set(stats.m);
  const auto add = [&](int64_t j, int64_t count) {  // returns e
    auto y =
        V::max(low, V::mul(V::sub(V::load(x + j), m), factor));  // -inf becomes kEmpty, NaN stays
    auto e = exp2<V>(y);
    if (count < V::lanes) {
      e = V::keep(e, count, zero);
      y = V::keep(y, count, zero);
    }
    s = V::add(s, e);
    u = V::fma(e, y, u);
    return e;
  };
  if (params.greedy) {
    for_vectors<V>(n, add);
    lead(x, n, first, top, race);
  } else {
    auto state = weyl<V>(params.key, first);
    const auto late = V::ints(params.key[1]),
               step = V::ints(kWeyl * static_cast<uint32_t>(V::lanes));
    auto bound = V::set(race.bound);
    for_vectors<V>(n, [&](int64_t j, int64_t count) {
      const auto e = add(j, count);
      uint32_t open = V::mask_not_above(V::upper(mixed<V>(state, late)), V::mul(bound, e));
      state = V::add(state, step);
      if (__builtin_expect(open == 0, 1)) return;
      if (count < V::lanes) open &= (1u << count) - 1u;
      for (; open; open &= open - 1) {
        const int64_t lane = __builtin_ctz(open);
        sample_contend(params, stats.m, first + j + lane, x[j + lane], race);
      }
      bound = V::set(race.bound);
    });
  }
  V::store(stats.s, s);
  V::store(stats.u, u);
}

template <class V>
constexpr SampleKernels sample_kernels() {
  return {V::lanes, absorb<V>, hash<V>};
}

}  // namespace
}  // namespace appo

// See sampling.h.

#include <algorithm>
#include <cmath>
#include <limits>

#include "sampling/run.h"

namespace appo {
namespace {

constexpr uint64_t kGolden = 0x9e3779b97f4a7c15u;
constexpr double kLn2 = 0.693147180559945309;

uint64_t splitmix(uint64_t x) {  // the finaliser of splitmix64 (Steele, Lea, Flood 2014)
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

uint32_t mixed(const uint32_t* key, uint32_t id) {  // as in kernels.h
  uint32_t x = key[0] + id * 0x9e3779b9u;
  x = (x ^ (x >> 17)) * 0xed5ad4bbu + key[1];
  x = (x ^ (x >> 11)) * 0xac4c1b51u;
  x = (x ^ (x >> 15)) * 0x31848babu;
  return x ^ (x >> 14);
}

double exponential(const uint32_t* key, int64_t id) {
  const double high = mixed(key, static_cast<uint32_t>(id)),
               low = mixed(key + 2, static_cast<uint32_t>(id));
  const double u = high * 0x1p-32 + (low + 0.5) * 0x1p-64;
  return -std::log1p(-std::min(u, 1.0 - 0x1p-53));
}

// Sums over all columns, in double.
struct Total {
  double m, s, u;
};

void join(Total& t, const RowStats& part, int64_t lanes, double scale2) {
  double s = 0.0, u = 0.0;
  for (int64_t l = 0; l < lanes; ++l) {
    s += part.s[l];
    u += part.u[l];
  }
  const double m = std::max(t.m, static_cast<double>(part.m)), before = (t.m - m) * scale2,
               now = (part.m - m) * scale2;
  const double a = std::exp2(before), b = std::exp2(now);
  t = {m, a * t.s + b * s, a * (t.u + before * t.s) + b * (u + now * s)};
}

bool better(const SampleParams& params, const Race& a, const Race& b) {
  if (params.greedy) return a.x > b.x || (a.x == b.x && a.id < b.id);
  return a.value < b.value || (a.value == b.value && a.id < b.id);
}

}  // namespace

SampleParams sample_params(int64_t seed, int64_t position, float inv_temp, bool greedy) {
  const uint64_t of_seed = splitmix(static_cast<uint64_t>(seed) + kGolden);
  const uint64_t high = splitmix(of_seed + (static_cast<uint64_t>(position) + 1) * kGolden);
  const uint64_t low = splitmix(high + kGolden);
  return {{static_cast<uint32_t>(high), static_cast<uint32_t>(high >> 32),
           static_cast<uint32_t>(low), static_cast<uint32_t>(low >> 32)},
          inv_temp,
          inv_temp * kLog2e,
          greedy};
}

Race race_start() {
  constexpr float inf = std::numeric_limits<float>::infinity();
  return {inf, -inf, inf, -1};
}

RowStats stats_start() {
  RowStats stats{};
  stats.m = kEmpty;
  return stats;
}

void sample_aim(const SampleParams& params, float m, Race& race) {
  // E / e of the best so far, in units of 2^-24; the margin covers the rounding of e, which is
  // below 3e-5.
  const double best = std::exp(race.value + static_cast<double>(m) * params.inv_temp);
  race.bound = static_cast<float>(best * (0x1p24 * 1.0001));
}

void sample_contend(const SampleParams& params, float m, int64_t id, float x, Race& race) {
  const double value =
      std::log(exponential(params.key, id)) - static_cast<double>(x) * params.inv_temp;
  if (!(value < race.value || (value == race.value && id < race.id))) return;
  race.value = value;
  race.x = x;
  race.id = id;
  sample_aim(params, m, race);
}

void finish_row(const SampleParams& params, const RowStats* stats, int64_t splits, int64_t rows,
                const Race* races, int64_t parts, int64_t lanes, const Sampled& out) {
  Total t{kEmpty, 0.0, 0.0};
  for (int64_t i = 0; i < splits; ++i) join(t, stats[i * rows], lanes, params.scale2);
  Race best = races[0];
  for (int64_t i = 1; i < parts; ++i) {
    if (better(params, races[i * rows], best)) best = races[i * rows];
  }
  // The largest logit weighs 1. NaN and +inf make s NaN, a row of -inf leaves it without a largest
  // one.
  const bool fine = t.s >= 1.0 && best.id >= 0;
  const double log_s = std::log(t.s);
  *out.token = fine ? best.id : -1;
  *out.logp = static_cast<float>((best.x - t.m) * params.inv_temp - log_s);
  *out.entropy = static_cast<float>(log_s - t.u * kLn2 / t.s);
}

}  // namespace appo

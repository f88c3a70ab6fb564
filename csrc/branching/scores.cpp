// The Branching Score. Twin of kernels/branching/op.py; the two are tested against each other.
//
// One call, one segment at a time in a workspace that fits the second-level cache (24 bytes a
// token). Reads entropy, log_ratio (4 or 8 bytes each) and mask (1), writes four vectors.

#include <tvm/ffi/function.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/checks.h"
#include "common/segments.h"

namespace appo {
namespace {

namespace ffi = tvm::ffi;

constexpr double kSumClamp = 20.0;  // on the discounted sum of log-ratios, before exp
constexpr double kZEps = 1e-6;      // added to the population standard deviation
constexpr double kFlat =
    1e-8;  // a deviation below kFlat * max(1, max|x|) is rounding, not information

template <typename T>
struct Scores {
  const T *entropy, *log_ratio;
  const uint8_t* mask;
  T *omega, *z_entropy, *z_omega, *score;
};

// One segment in double, n values each. Loops over these arrays alone are what the compiler
// vectorises.
struct Work {
  double *omega, *entropy, *keep;
};

struct Moments {
  double mean, divisor;
  bool constant;
};

APPO_VECTOR void drop_masked(const Work& w, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    w.omega[i] = w.keep[i] != 0.0 ? w.omega[i] : 0.0;  // NaN * 0 would be NaN
  for (int64_t i = 0; i < n; ++i) w.entropy[i] = w.keep[i] != 0.0 ? w.entropy[i] : 0.0;
}

APPO_VECTOR void clipped_exp(double* x, int64_t n, double low, double high) {
  for (int64_t i = 0; i < n; ++i)
    x[i] = clip(exp_bounded(clip(x[i], -kSumClamp, kSumClamp)), low, high);
}

// Over the tokens with keep = 1, two passes. Where keep is 0, x must not be NaN or infinite unless
// some kept x is.
APPO_VECTOR Moments moments(const double* x, const double* keep, int64_t n, double count) {
  const double mean = sum_of(n, [&](int64_t i) { return keep[i] * x[i]; }) / count;
  const double square = sum_of(n, [&](int64_t i) {
    const double c = keep[i] * (x[i] - mean);
    return c * c;
  });
  const double largest = max_of(n, 1.0, [&](int64_t i) { return keep[i] * std::fabs(x[i]); });
  const double deviation = std::sqrt(square / count);
  return {mean, deviation + kZEps, deviation <= kFlat * largest};  // NaN: unknown is not constant
}

APPO_VECTOR void standardise(double* x, const double* keep, int64_t n, const Moments& m) {
  const double mean = m.mean, divisor = m.divisor;
  for (int64_t i = 0; i < n; ++i) {
    const double z = (x[i] - mean) / divisor;
    x[i] = keep[i] != 0.0 ? z : 0.0;
  }
}

template <typename T>
void store(const double* x, int64_t n, T* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(x[i]);
}

// Returns whether Ω says nothing. A constant vector is standardised to 0 in the paper's variant.
template <typename T>
bool score_segment(const Scores<T>& s, int64_t begin, int64_t n, double gamma, double low,
                   double high, bool paper, const Work& w) {
  for (int64_t i = 0; i < n; ++i) w.keep[i] = static_cast<int32_t>(s.mask[begin + i]);
  for (int64_t i = 0; i < n; ++i) w.entropy[i] = s.entropy[begin + i];
  for (int64_t i = 0; i < n; ++i) w.omega[i] = s.log_ratio[begin + i];
  drop_masked(w, n);
  double sum = 0.0;
  for (int64_t i = n - 1; i >= 0; --i) w.omega[i] = sum = discounted(w.omega[i], sum, gamma);
  clipped_exp(w.omega, n, low, high);
  store(w.omega, n, s.omega + begin);

  const double count = std::max(1.0, sum_of(n, [&](int64_t i) { return w.keep[i]; }));
  const Moments e = moments(w.entropy, w.keep, n, count), o = moments(w.omega, w.keep, n, count);
  paper&& e.constant ? std::fill(w.entropy, w.entropy + n, 0.0) : standardise(w.entropy, w.keep, n, e);
  paper&& o.constant ? std::fill(w.omega, w.omega + n, 0.0) : standardise(w.omega, w.keep, n, o);
  store(w.entropy, n, s.z_entropy + begin);
  store(w.omega, n, s.z_omega + begin);
  for (int64_t i = 0; i < n; ++i) s.score[begin + i] = static_cast<T>(w.entropy[i] * w.omega[i]);
  return o.constant;
}

template <typename T>
void score_all(const Scores<T>& s, const int64_t* offsets, int64_t segments, double gamma,
               double low, double high, bool paper, uint8_t* omega_uninformative, int64_t threads) {
  for_segments(offsets, segments, threads, [&](int64_t first, int64_t last) {
    std::vector<double> work;
    for (int64_t b = first; b < last; ++b) {
      const int64_t n = offsets[b + 1] - offsets[b];
      if (work.size() < static_cast<size_t>(3 * n)) work.resize(static_cast<size_t>(3 * n));
      const Work w{work.data(), work.data() + n, work.data() + 2 * n};
      omega_uninformative[b] = score_segment(s, offsets[b], n, gamma, low, high, paper, w);
    }
  });
}

void branch_scores(ffi::TensorView entropy, ffi::TensorView log_ratio, ffi::TensorView mask,
                   ffi::TensorView offsets, double gamma, double low, double high, bool paper,
                   ffi::TensorView omega, ffi::TensorView z_entropy, ffi::TensorView z_omega,
                   ffi::TensorView score, ffi::TensorView omega_uninformative, int64_t threads) {
  TVM_FFI_CHECK(log_ratio.ndim() == 1, ValueError) << "log_ratio must be [N]";
  const int64_t tokens = log_ratio.size(0);
  const uint8_t bits = check_floats(log_ratio, "log_ratio", tokens);
  check_vector(entropy, "entropy", kDLFloat, bits, tokens);
  check_vector(mask, "mask", kDLUInt, 8, tokens);
  check_vector(omega, "omega", kDLFloat, bits, tokens);
  check_vector(z_entropy, "z_entropy", kDLFloat, bits, tokens);
  check_vector(z_omega, "z_omega", kDLFloat, bits, tokens);
  check_vector(score, "score", kDLFloat, bits, tokens);
  check_gamma(gamma);
  const int64_t* o = check_offsets(offsets, tokens);
  const int64_t segments = offsets.size(0) - 1;
  check_vector(omega_uninformative, "omega_uninformative", kDLUInt, 8, segments);
  auto go = [&](auto zero) {
    using T = decltype(zero);
    const Scores<T> s{data<const T>(entropy), data<const T>(log_ratio), data<const uint8_t>(mask),
                      data<T>(omega),         data<T>(z_entropy),       data<T>(z_omega),
                      data<T>(score)};
    score_all(s, o, segments, gamma, low, high, paper, data<uint8_t>(omega_uninformative), threads);
  };
  bits == 32 ? go(0.0f) : go(0.0);
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(branch_scores, branch_scores);

}  // namespace appo

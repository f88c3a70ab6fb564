// Ratio, future-aware scale, clipped surrogate, its gradient and the sums that are reported: one
// backward sweep per row. Twin of kernels/policy_loss/backend_torch.py; the two are tested against
// each other.
//
// Reads logp, old_logp, advantage (4 or 8 bytes each) and mask (1); writes future and gradient.
// Everything between is in double, in blocks of tokens that stay in the first-level cache.

#include <tvm/ffi/function.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "common/checks.h"
#include "common/segments.h"

namespace appo {
namespace {

namespace ffi = tvm::ffi;

constexpr int64_t kBlock = 256;
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kClamp = 20.0;  // on log-ratios and their discounted sums, before exp

enum Sum : int64_t { kLoss, kTokens, kClipped, kKl, kAbs, kScale, kSums };

struct Rules {
  double gamma, future_low, future_high, future_weight, clip_low, clip_high, dual_clip;
  bool future;
};

template <typename T>
struct Tokens {
  const T *logp, *old_logp, *advantage;
  const uint8_t* mask;
  T *future, *gradient;
};

// One block of tokens, everything in double. Loops over these arrays alone are what the compiler
// vectorises.
struct Block {
  double d[kBlock], keep[kBlock], own[kBlock], scale[kBlock];       // in
  double loss[kBlock], slope[kBlock], clipped[kBlock], kl[kBlock];  // out, 0 where keep is 0
};

template <typename T>
void load(const Tokens<T>& t, int64_t begin, int64_t n, Block& b) {
  for (int64_t i = 0; i < n; ++i) b.keep[i] = static_cast<int32_t>(t.mask[begin + i]);
  for (int64_t i = 0; i < n; ++i)
    b.d[i] = static_cast<double>(t.logp[begin + i]) - t.old_logp[begin + i];
  for (int64_t i = 0; i < n; ++i) b.own[i] = t.advantage[begin + i];
  for (int64_t i = 0; i < n; ++i) b.scale[i] = 1.0;
}

APPO_VECTOR void drop_masked(Block& b, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    b.d[i] = b.keep[i] != 0.0 ? b.d[i] : 0.0;  // not a product: NaN * 0 is NaN
}

// scale[i] = clip(exp(clamp(S, ±20))), S the discounted sum; `ahead` is S after the block and
// becomes S before it.
APPO_VECTOR void future(Block& b, int64_t n, const Rules& rule, double& ahead) {
  double sum = ahead;
  for (int64_t i = n - 1; i >= 0; --i) b.scale[i] = sum = discounted(b.d[i], sum, rule.gamma);
  ahead = sum;
  const double low = rule.future_low, high = rule.future_high;
  for (int64_t i = 0; i < n; ++i)
    b.scale[i] = clip(exp_bounded(clip(b.scale[i], -kClamp, kClamp)), low, high);
}

// The surrogate max(-A r, -A clip(r)), capped at -A dual_clip where A < 0, and its derivative by
// the log-ratio.
APPO_VECTOR void surrogate(Block& b, int64_t n, const Rules& rule) {
  const double low = 1.0 - rule.clip_low, high = 1.0 + rule.clip_high, cap = rule.dual_clip;
  for (int64_t i = 0; i < n; ++i) {
    const double advantage = b.own[i] * b.scale[i], d = b.d[i];
    const double ratio = exp_bounded(clip(d, -kClamp, kClamp));
    const double plain = -advantage * ratio, bounded = -advantage * clip(ratio, low, high);
    const double most = advantage < 0.0 ? -advantage * cap : kInfinity;
    double value = plain < bounded ? bounded : plain;
    double slope = plain < bounded ? 0.0 : plain;  // NaN stays NaN
    slope = value > most ? 0.0 : slope;
    value = value > most ? most : value;
    slope = d > kClamp ? 0.0 : slope;
    slope = d < -kClamp ? 0.0 : slope;
    b.loss[i] = b.keep[i] != 0.0 ? value : 0.0;
    b.slope[i] = b.keep[i] != 0.0 ? slope : 0.0;
    const double above = b.own[i] > 0.0 ? ratio : low, below = b.own[i] < 0.0 ? ratio : high;
    const double clipped = above > high ? 1.0 : 0.0;
    b.clipped[i] = b.keep[i] * (below < low ? 1.0 : clipped);
    b.kl[i] = (ratio - 1.0) - d;  // 0 outside the mask, where d is 0
  }
}

APPO_VECTOR void add_sums(const Block& b, int64_t n, double row_weight, double* sums) {
  sums[kLoss] += row_weight * sum_of(n, [&](int64_t i) { return b.loss[i]; });
  sums[kTokens] += sum_of(n, [&](int64_t i) { return b.keep[i]; });
  sums[kClipped] += sum_of(n, [&](int64_t i) { return b.clipped[i]; });
  sums[kKl] += sum_of(n, [&](int64_t i) { return b.kl[i]; });
  sums[kAbs] += sum_of(n, [&](int64_t i) { return std::fabs(b.d[i]); });
  sums[kScale] += sum_of(n, [&](int64_t i) { return b.keep[i] * b.scale[i]; });
}

// Tokens begin … begin+n-1 of a row, n <= kBlock.
template <typename T>
void block(const Tokens<T>& t, const Rules& rule, double row_weight, int64_t begin, int64_t n,
           double& ahead, double* sums) {
  Block b;
  load(t, begin, n, b);
  drop_masked(b, n);
  if (rule.future) {
    future(b, n, rule, ahead);
    for (int64_t i = 0; i < n; ++i) t.future[begin + i] = static_cast<T>(b.scale[i]);
    for (int64_t i = 0; i < n; ++i) b.scale[i] = 1.0 + rule.future_weight * b.scale[i];
  }
  surrogate(b, n, rule);
  add_sums(b, n, row_weight, sums);
  for (int64_t i = 0; i < n; ++i) t.gradient[begin + i] = static_cast<T>(row_weight * b.slope[i]);
}

// Sums are kept per row and added in row order, so the bits do not depend on the number of threads.
template <typename T>
void rows(const Tokens<T>& t, const Rules& rule, const int64_t* offsets, const double* weight,
          int64_t count, double* row_sums, double* sums, int64_t threads) {
  for_segments(offsets, count, threads, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      double ahead = 0.0;
      for (int64_t end = offsets[r + 1]; end > offsets[r];) {
        const int64_t n = std::min(kBlock, end - offsets[r]);
        end -= n;
        block(t, rule, weight[r], end, n, ahead, row_sums + r * kSums);
      }
    }
  });
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t s = 0; s < kSums; ++s) sums[s] += row_sums[r * kSums + s];
  }
}

template <typename T>
void run(const ffi::TensorView& logp, const ffi::TensorView& old_logp,
         const ffi::TensorView& advantage, const ffi::TensorView& mask,
         const ffi::TensorView& future, const ffi::TensorView& gradient, const Rules& rule,
         const int64_t* offsets, const double* weight, int64_t count, double* sums,
         int64_t threads) {
  const Tokens<T> t{data<const T>(logp),       data<const T>(old_logp), data<const T>(advantage),
                    data<const uint8_t>(mask), data<T>(future),          data<T>(gradient)};
  std::vector<double> row_sums(static_cast<size_t>(count * kSums), 0.0);
  std::fill(sums, sums + kSums, 0.0);
  rows(t, rule, offsets, weight, count, row_sums.data(), sums, threads);
}

// gamma < 0: no future term, `future` has no items; dual_clip infinite: none. sums[6]: see enum
// Sum.
void policy_loss(ffi::TensorView logp, ffi::TensorView old_logp, ffi::TensorView advantage,
                 ffi::TensorView mask, ffi::TensorView offsets, ffi::TensorView row_weight,
                 double gamma, double future_low, double future_high, double future_weight,
                 double clip_low, double clip_high, double dual_clip, ffi::TensorView future,
                 ffi::TensorView gradient, ffi::TensorView sums, int64_t threads) {
  TVM_FFI_CHECK(logp.ndim() == 1, ValueError) << "logp must be [N]";
  const int64_t tokens = logp.size(0);
  const Rules rule{gamma,    future_low, future_high, future_weight,
                   clip_low, clip_high,  dual_clip,   gamma >= 0.0};
  const uint8_t bits = check_floats(logp, "logp", tokens);
  check_vector(old_logp, "old_logp", kDLFloat, bits, tokens);
  check_vector(advantage, "advantage", kDLFloat, bits, tokens);
  check_vector(gradient, "gradient", kDLFloat, bits, tokens);
  check_vector(future, "future", kDLFloat, bits, rule.future ? tokens : 0);
  check_vector(mask, "mask", kDLUInt, 8, tokens);
  check_vector(sums, "sums", kDLFloat, 64, kSums);
  const int64_t* o = check_offsets(offsets, tokens);
  const int64_t count = offsets.size(0) - 1;
  check_vector(row_weight, "row_weight", kDLFloat, 64, count);
  const auto* w = data<const double>(row_weight);
  auto go = bits == 32 ? run<float> : run<double>;
  go(logp, old_logp, advantage, mask, future, gradient, rule, o, w, count, data<double>(sums),
     threads);
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(policy_loss, policy_loss);

}  // namespace appo

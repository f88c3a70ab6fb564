// The Branching Score and the choice of positions. Twins of kernels/branching.py and kernels/selection.py; tested
// against each other.
//
// Scores: one call, one segment at a time in a workspace that fits the second-level cache (24 bytes a token). Reads
// entropy, log_ratio (4 or 8 bytes each) and mask (1), writes four vectors. Selection reads three of them and eligible.

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

constexpr double kSumClamp = 20.0;  // on the discounted sum of log-ratios, before exp
constexpr double kZEps = 1e-6;      // added to the population standard deviation
constexpr double kFlat = 1e-8;      // a deviation below kFlat * max(1, max|x|) is rounding, not information

template <typename T>
struct Scores {
  const T *entropy, *log_ratio;
  const uint8_t* mask;
  T *omega, *z_entropy, *z_omega, *score;
};

// One segment in double, n values each. Loops over these arrays alone are what the compiler vectorises.
struct Work {
  double *omega, *entropy, *keep;
};

struct Moments {
  double mean, divisor;
  bool flat;
};

APPO_VECTOR void drop_masked(const Work& w, int64_t n) {
  for (int64_t i = 0; i < n; ++i) w.omega[i] = w.keep[i] != 0.0 ? w.omega[i] : 0.0;  // NaN * 0 would be NaN
  for (int64_t i = 0; i < n; ++i) w.entropy[i] = w.keep[i] != 0.0 ? w.entropy[i] : 0.0;
}

APPO_VECTOR void clipped_exp(double* x, int64_t n, double low, double high) {
  for (int64_t i = 0; i < n; ++i) x[i] = clip(exp_bounded(clip(x[i], -kSumClamp, kSumClamp)), low, high);
}

// Over the tokens with keep = 1, two passes. Where keep is 0, x must not be NaN or infinite unless some kept x is.
APPO_VECTOR Moments moments(const double* x, const double* keep, int64_t n, double count) {
  const double mean = sum_of(n, [&](int64_t i) { return keep[i] * x[i]; }) / count;
  const double square = sum_of(n, [&](int64_t i) {
    const double c = keep[i] * (x[i] - mean);
    return c * c;
  });
  const double largest = max_of(n, 1.0, [&](int64_t i) { return keep[i] * std::fabs(x[i]); });
  const double deviation = std::sqrt(square / count);
  return {mean, deviation + kZEps, deviation <= kFlat * largest};  // NaN: unknown is not flat
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

// Returns whether Ω says nothing. A flat vector is standardised to 0 in the paper's variant.
template <typename T>
bool score_segment(const Scores<T>& s, int64_t begin, int64_t n, double gamma, double low, double high, bool paper,
                   const Work& w) {
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
  paper && e.flat ? std::fill(w.entropy, w.entropy + n, 0.0) : standardise(w.entropy, w.keep, n, e);
  paper && o.flat ? std::fill(w.omega, w.omega + n, 0.0) : standardise(w.omega, w.keep, n, o);
  store(w.entropy, n, s.z_entropy + begin);
  store(w.omega, n, s.z_omega + begin);
  for (int64_t i = 0; i < n; ++i) s.score[begin + i] = static_cast<T>(w.entropy[i] * w.omega[i]);
  return o.flat;
}

template <typename T>
void score_all(const Scores<T>& s, const int64_t* offsets, int64_t segments, double gamma, double low, double high,
               bool paper, uint8_t* flat, int64_t threads) {
  for_segments(offsets, segments, threads, [&](int64_t first, int64_t last) {
    std::vector<double> work;
    for (int64_t b = first; b < last; ++b) {
      const int64_t n = offsets[b + 1] - offsets[b];
      if (work.size() < static_cast<size_t>(3 * n)) work.resize(static_cast<size_t>(3 * n));
      const Work w{work.data(), work.data() + n, work.data() + 2 * n};
      flat[b] = score_segment(s, offsets[b], n, gamma, low, high, paper, w);
    }
  });
}

void branch_scores(ffi::TensorView entropy, ffi::TensorView log_ratio, ffi::TensorView mask, ffi::TensorView offsets,
                   double gamma, double low, double high, bool paper, ffi::TensorView omega, ffi::TensorView z_entropy,
                   ffi::TensorView z_omega, ffi::TensorView score, ffi::TensorView flat, int64_t threads) {
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
  check_vector(flat, "flat", kDLUInt, 8, segments);
  auto go = [&](auto zero) {
    using T = decltype(zero);
    const Scores<T> s{data<const T>(entropy), data<const T>(log_ratio), data<const uint8_t>(mask), data<T>(omega),
                      data<T>(z_entropy),     data<T>(z_omega),         data<T>(score)};
    score_all(s, o, segments, gamma, low, high, paper, data<uint8_t>(flat), threads);
  };
  bits == 32 ? go(0.0f) : go(0.0);
}

// -- selection --------------------------------------------------------------------------------------------------------

constexpr int64_t kEmpty = -1, kStrict = 0, kEntropy = 1, kProduct = 2;
constexpr int64_t kBlock = 64;

template <typename T>
struct Candidates {
  const T *z_entropy, *z_omega, *score;
  const uint8_t* eligible;
  bool paper;
};

template <typename T>
struct Pick {
  T value;  // NaN is -inf, so that it ranks last
  int64_t rule, position;
};

// Strict first, then value, then the earlier position: a total order, so the result does not depend on the algorithm.
template <typename T>
bool before(const Pick<T>& a, const Pick<T>& b) {
  if (a.rule != b.rule) return a.rule < b.rule;
  if (a.value != b.value) return a.value > b.value;
  return a.position < b.position;
}

// The best k of one group. Positions arrive in increasing order, so a newcomer must be strictly better than the worst
// of the chosen, which lies on top of the heap.
template <typename T>
class Best {
 public:
  explicit Best(int64_t k) : k_(k) {}

  void add(const Candidates<T>& c, int64_t begin, int64_t end) {
    for (int64_t from = begin; from < end; from += kBlock) {
      const int64_t to = std::min(from + kBlock, end);
      if (!full_of_strict() || any_better(c, from, to)) {
        for (int64_t i = from; i < to; ++i) consider(c, i);
      }
    }
  }

  const std::vector<Pick<T>>& sorted() {
    std::sort_heap(heap_.begin(), heap_.end(), before<T>);
    return heap_;
  }

 private:
  bool full() const { return static_cast<int64_t>(heap_.size()) == k_; }
  bool full_of_strict() const { return full() && heap_.front().rule == kStrict; }

  // Without branches over a block of tokens: nearly always false once the heap holds good ones.
  bool any_better(const Candidates<T>& c, int64_t from, int64_t to) const {
    const T worst = heap_.front().value;
    int found = 0;
    for (int64_t i = from; i < to; ++i) {
      found |= (c.score[i] > worst) & (c.eligible[i] != 0) & (c.z_entropy[i] > 0) & (c.z_omega[i] > 0);
    }
    return found != 0;
  }

  void consider(const Candidates<T>& c, int64_t i) {
    const bool positive = c.z_entropy[i] > 0;
    if (!c.eligible[i] || (c.paper && !positive)) return;
    const bool strict = positive && c.z_omega[i] > 0;
    const T value = strict || !c.paper ? c.score[i] : c.z_entropy[i];
    const Pick<T> pick{std::isnan(value) ? -std::numeric_limits<T>::infinity() : value,
                       strict ? kStrict : (c.paper ? kEntropy : kProduct), i};
    if (!full()) {
      heap_.push_back(pick);
    } else if (before(pick, heap_.front())) {
      std::pop_heap(heap_.begin(), heap_.end(), before<T>);
      heap_.back() = pick;
    } else {
      return;
    }
    std::push_heap(heap_.begin(), heap_.end(), before<T>);
  }

  int64_t k_;
  std::vector<Pick<T>> heap_;
};

// Segments in the order of their groups: members[first[g] … first[g+1]-1] are those of group g, in packed order.
struct Groups {
  std::vector<int64_t> first, members, tokens;  // tokens[g]: those of groups 0 … g-1
};

Groups group_segments(const int64_t* offsets, const int64_t* groups, int64_t segments, int64_t count) {
  Groups g{std::vector<int64_t>(count + 1), std::vector<int64_t>(segments), std::vector<int64_t>(count + 1)};
  for (int64_t b = 0; b < segments; ++b) {
    TVM_FFI_CHECK(groups[b] >= 0 && groups[b] < count, ValueError)
        << "groups[" << b << "] is " << groups[b] << ", expected 0 … " << count - 1;
    ++g.first[groups[b] + 1];
    g.tokens[groups[b] + 1] += offsets[b + 1] - offsets[b];
  }
  for (int64_t i = 0; i < count; ++i) {
    g.first[i + 1] += g.first[i];
    g.tokens[i + 1] += g.tokens[i];
  }
  std::vector<int64_t> next(g.first);
  for (int64_t b = 0; b < segments; ++b) g.members[next[groups[b]]++] = b;
  return g;
}

template <typename T>
void select_all(const Candidates<T>& c, const int64_t* offsets, const Groups& g, int64_t k, int64_t* index,
                int64_t* rule, int64_t* count, int64_t threads) {
  const auto groups = static_cast<int64_t>(g.first.size()) - 1;
  for_segments(g.tokens.data(), groups, threads, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      Best<T> best(k);
      for (int64_t m = g.first[group]; k > 0 && m < g.first[group + 1]; ++m) {
        best.add(c, offsets[g.members[m]], offsets[g.members[m] + 1]);
      }
      int64_t slot = 0;
      for (const Pick<T>& pick : best.sorted()) {
        index[group * k + slot] = pick.position;
        rule[group * k + slot++] = pick.rule;
      }
      count[group] = slot;
      std::fill(index + group * k + slot, index + (group + 1) * k, kEmpty);
      std::fill(rule + group * k + slot, rule + (group + 1) * k, kEmpty);
    }
  });
}

void select_branch_points(ffi::TensorView z_entropy, ffi::TensorView z_omega, ffi::TensorView score,
                          ffi::TensorView eligible, ffi::TensorView offsets, ffi::TensorView groups, int64_t k,
                          bool paper, ffi::TensorView index, ffi::TensorView rule, ffi::TensorView count,
                          int64_t threads) {
  TVM_FFI_CHECK(score.ndim() == 1 && count.ndim() == 1, ValueError) << "score must be [N] and count [G]";
  const int64_t tokens = score.size(0), n_groups = count.size(0);
  const uint8_t bits = check_floats(score, "score", tokens);
  check_vector(z_entropy, "z_entropy", kDLFloat, bits, tokens);
  check_vector(z_omega, "z_omega", kDLFloat, bits, tokens);
  check_vector(eligible, "eligible", kDLUInt, 8, tokens);
  const int64_t* o = check_offsets(offsets, tokens);
  const int64_t segments = offsets.size(0) - 1;
  check_vector(groups, "groups", kDLInt, 64, segments);
  TVM_FFI_CHECK(k >= 0, ValueError) << "k is " << k << ", expected >= 0";
  check_vector(index, "index", kDLInt, 64, n_groups * k);
  check_vector(rule, "rule", kDLInt, 64, n_groups * k);
  check_vector(count, "count", kDLInt, 64, n_groups);
  const Groups g = group_segments(o, data<const int64_t>(groups), segments, n_groups);
  auto go = [&](auto zero) {
    using T = decltype(zero);
    const Candidates<T> c{data<const T>(z_entropy), data<const T>(z_omega), data<const T>(score),
                          data<const uint8_t>(eligible), paper};
    select_all(c, o, g, k, data<int64_t>(index), data<int64_t>(rule), data<int64_t>(count), threads);
  };
  bits == 32 ? go(0.0f) : go(0.0);
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(branch_scores, branch_scores);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(select_branch_points, select_branch_points);

}  // namespace appo

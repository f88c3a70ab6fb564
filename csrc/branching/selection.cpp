// The choice of positions to branch at. Twin of kernels/branching/selection.py; the two are tested against
// each other.
//
// Reads three of the vectors that branch_scores writes, and eligible.

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

// Strict first, then value, then the earlier position: a total order, so the result does not depend
// on the algorithm.
template <typename T>
bool before(const Pick<T>& a, const Pick<T>& b) {
  if (a.rule != b.rule) return a.rule < b.rule;
  if (a.value != b.value) return a.value > b.value;
  return a.position < b.position;
}

// The best k of one group. Positions arrive in increasing order, so a newcomer must be strictly
// better than the worst of the chosen, which lies on top of the heap.
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
      found |=
          (c.score[i] > worst) & (c.eligible[i] != 0) & (c.z_entropy[i] > 0) & (c.z_omega[i] > 0);
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

// Segments in the order of their groups: members[first[g] … first[g+1]-1] are those of group g, in
// packed order.
struct Groups {
  std::vector<int64_t> first, members, tokens;  // tokens[g]: those of groups 0 … g-1
};

Groups group_segments(const int64_t* offsets, const int64_t* groups, int64_t segments,
                      int64_t count) {
  Groups g{std::vector<int64_t>(count + 1), std::vector<int64_t>(segments),
           std::vector<int64_t>(count + 1)};
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
void select_all(const Candidates<T>& c, const int64_t* offsets, const Groups& g, int64_t k,
                int64_t* index, int64_t* rule, int64_t* count, int64_t threads) {
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
                          ffi::TensorView eligible, ffi::TensorView offsets, ffi::TensorView groups,
                          int64_t k, bool paper, ffi::TensorView index, ffi::TensorView rule,
                          ffi::TensorView count, int64_t threads) {
  TVM_FFI_CHECK(score.ndim() == 1 && count.ndim() == 1, ValueError)
      << "score must be [N] and count [G]";
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
    select_all(c, o, g, k, data<int64_t>(index), data<int64_t>(rule), data<int64_t>(count),
               threads);
  };
  bits == 32 ? go(0.0f) : go(0.0);
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(select_branch_points, select_branch_points);

}  // namespace appo

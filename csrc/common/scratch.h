// Scratch memory, and the rounding of its sizes.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace appo {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Scratch memory: aligned to cache lines (or to a larger power of two), not initialised.
class Scratch {
 public:
  explicit Scratch(int64_t floats, int64_t align = 64) {
    if (floats <= 0) return;
    data_.reset(static_cast<float*>(
        std::aligned_alloc(align, static_cast<size_t>(round_up(floats * 4, align)))));
    if (!data_) throw std::bad_alloc();
  }
  float* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  std::unique_ptr<float, Free> data_;
};

}  // namespace appo

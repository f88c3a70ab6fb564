// Units of work over threads that take the next one when they are done.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "common/threads.h"

namespace appo {

// body(unit, part) for every unit, in any order, on at most `threads` threads; part numbers the
// thread.
template <typename Body>
void run_units(int64_t units, int64_t threads, Body&& body) {
  std::atomic<int64_t> next{0};
  run_parts(std::min(units, threads), [&](int64_t part) {
    for (int64_t unit = next++; unit < units; unit = next++) body(unit, part);
  });
}

}  // namespace appo

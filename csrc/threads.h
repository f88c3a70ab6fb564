// Short-lived worker threads over contiguous ranges. They block in join() and never spin, so a busy neighbour core
// costs its share of time and no more (an OpenMP team that spins falls 20-50x on a shared machine).
#pragma once

#include <algorithm>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

namespace appo {

// Calls body(part) for part = 0 … parts-1, the last one on the calling thread. The first exception is rethrown.
template <typename Body>
void run_parts(int64_t parts, Body&& body) {
  std::vector<std::exception_ptr> errors(static_cast<size_t>(std::max<int64_t>(parts, 1)));
  auto guarded = [&](int64_t part) {
    try {
      body(part);
    } catch (...) {
      errors[static_cast<size_t>(part)] = std::current_exception();
    }
  };
  std::vector<std::thread> workers;
  workers.reserve(errors.size());
  for (int64_t part = 0; part + 1 < parts; ++part) workers.emplace_back(guarded, part);
  if (parts > 0) guarded(parts - 1);
  for (std::thread& worker : workers) worker.join();
  for (const std::exception_ptr& error : errors) {
    if (error) std::rethrow_exception(error);
  }
}

}  // namespace appo

// Short-lived worker threads over contiguous ranges. They block in join() and never spin, so a busy
// neighbour core costs its share of time and no more (an OpenMP team that spins falls 20-50x on a
// shared machine).
#pragma once

#include <algorithm>
#include <cstdint>
#include <exception>
#include <system_error>
#include <thread>
#include <vector>

namespace appo {

// Calls body(part) for part = 0 … parts-1, the last one on the calling thread, with those that no
// thread could be started for. The first exception is rethrown.
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
  int64_t started = 0;
  try {
    for (; started + 1 < parts; ++started) workers.emplace_back(guarded, started);
  } catch (const std::system_error&) {
    // No more threads to be had (a process limit, no memory for a stack): this one does the rest.
  }
  for (int64_t part = started; part < parts; ++part) guarded(part);
  for (std::thread& worker : workers) worker.join();
  for (const std::exception_ptr& error : errors) {
    if (error) std::rethrow_exception(error);
  }
}

}  // namespace appo

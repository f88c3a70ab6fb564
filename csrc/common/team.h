// Worker threads that stay between jobs. They sleep on a condition variable and never spin: a busy
// neighbour core costs its share of time and no more. To wake one takes less time than to start
// one, which counts in a decode step with over a hundred short jobs.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace appo {

using Work = void (*)(void* context, int64_t part);

// work(context, part) on the calling thread (part 0) and on up to parts-1 others. Each of those
// takes a free part when it wakes, if the caller has not finished by then: a job never waits for a
// thread that has not begun. One job at a time per process; further callers wait. The first
// exception is rethrown.
void share_work(int64_t parts, Work work, void* context);

constexpr int64_t kMostParts = 64;  // threads of one job

// body(unit, part) for every unit on at most `threads` threads; part < threads numbers the thread.
// Each thread has a run of neighbouring units, so that what it fetches ahead is what it works on
// next; one that is done takes from the others.
template <typename Body>
void run_team(int64_t units, int64_t threads, Body&& body) {
  const int64_t parts = std::min({units, threads, kMostParts});
  if (parts <= 1) {
    for (int64_t unit = 0; unit < units; ++unit) body(unit, int64_t{0});
    return;
  }
  struct alignas(64) Run {
    std::atomic<int64_t> next;
    int64_t end;
  } runs[kMostParts];
  for (int64_t i = 0; i < parts; ++i) {
    runs[i].next = units * i / parts;
    runs[i].end = units * (i + 1) / parts;
  }
  auto take = [&](int64_t part) {
    for (int64_t i = 0; i < parts; ++i) {
      Run& run = runs[(part + i) % parts];
      for (int64_t unit = run.next++; unit < run.end; unit = run.next++) body(unit, part);
    }
  };
  share_work(
      parts, [](void* context, int64_t part) { (*static_cast<decltype(take)*>(context))(part); },
      &take);
}

}  // namespace appo

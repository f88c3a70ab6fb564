// See team.h.

#include "common/team.h"

#include <condition_variable>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>

#ifndef _WIN32
#include <pthread.h>
#endif

namespace appo {
namespace {

struct Team {
  std::mutex one_job;  // held by the caller of share_work

  std::mutex state;  // guards what follows
  std::condition_variable wake, finished;
  Work work = nullptr;
  void* context = nullptr;
  int64_t free_parts = 0, running = 0, workers = 0;
  std::exception_ptr error;

  void serve() {
    std::unique_lock<std::mutex> lock(state);
    for (;;) {
      wake.wait(lock, [&] { return free_parts > 0; });
      const int64_t part = free_parts--;
      ++running;
      lock.unlock();
      attempt(part);
      lock.lock();
      if (--running == 0) finished.notify_one();
    }
  }

  void attempt(int64_t part) {
    try {
      work(context, part);
    } catch (...) {
      std::lock_guard<std::mutex> lock(state);
      if (!error) error = std::current_exception();
    }
  }

  void grow(int64_t count) {
    try {
      for (; workers < count; ++workers) std::thread(&Team::serve, this).detach();
    } catch (const std::system_error&) {
      // No more threads to be had: those that there are, and the caller, do the work.
    }
  }
};

// Never destroyed: its threads sleep on it until the process ends. A forked child has none of them
// and gets a new one.
Team* team = nullptr;

Team& this_process() {
  static const bool ready = [] {
    team = new Team;
#ifndef _WIN32
    pthread_atfork(nullptr, nullptr, [] { team = new Team; });
#endif
    return true;
  }();
  (void)ready;
  return *team;
}

}  // namespace

void share_work(int64_t parts, Work work, void* context) {
  Team& t = this_process();
  std::lock_guard<std::mutex> job(t.one_job);
  {
    std::lock_guard<std::mutex> lock(t.state);
    t.grow(parts - 1);
    t.work = work;
    t.context = context;
    t.error = nullptr;
    t.free_parts = parts - 1;
  }
  if (parts == 2) {
    t.wake.notify_one();
  } else {
    t.wake.notify_all();
  }
  t.attempt(0);
  std::unique_lock<std::mutex> lock(t.state);
  t.free_parts = 0;
  t.finished.wait(lock, [&] { return t.running == 0; });
  if (t.error) std::rethrow_exception(t.error);
}

}  // namespace appo

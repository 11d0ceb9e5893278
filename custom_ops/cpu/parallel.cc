#include "parallel.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cpu_quota.h"
#include "cpu_topology.h"
#include "environment.h"
#include "futex.h"
#include "loop_pieces.h"
#include "loop_times.h"
#include "relax.h"

namespace fd {
namespace {

// Long enough to bridge the Python code between two ops of a step (tens of microseconds would be
// felt by other processes on a shared core), short against a sleeping thread's wake-up (~50 us).
std::atomic<int> patience{20};  // microseconds

constexpr size_t kCacheLine = 64;
constexpr int64_t kMostThreads = 4096;

int64_t now() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

template <typename Condition>
bool spin_until(const Condition& done) {
  const auto deadline = std::chrono::steady_clock::now() +
                        std::chrono::microseconds(patience.load(std::memory_order_relaxed));
  do {
    for (int i = 0; i < 16; ++i) {
      if (done()) return true;
      relax();
    }
  } while (std::chrono::steady_clock::now() < deadline);
  return false;
}

// A helper stays on the fast cores, unless more threads are wanted than there are. The thread that
// begins a loop is somebody else's and stays where its owner wants it.
void keep_to_loop_cpus() {
  const std::vector<int>& cpus = loop_cpus();
  if (cpus.size() == allowed_cpus().size() || num_threads() > static_cast<int>(cpus.size())) return;
  cpu_set_t set;
  CPU_ZERO(&set);
  for (int cpu : cpus) CPU_SET(cpu, &set);
  sched_setaffinity(0, sizeof(set), &set);
}

struct Loop {
  Loop(RangeFunction function, void* context, int64_t count, int64_t grain, int workers)
      : function(function), context(context), pieces(count, grain, workers) {}

  const RangeFunction function;
  void* const context;
  const LoopPieces pieces;
  std::atomic<int64_t>* busy = nullptr;  // per seat, where the loop is timed
  alignas(kCacheLine) std::atomic<int64_t> next{0};

  void work(int seat) {
    const int64_t started = busy ? now() : 0;
    for (;;) {
      const auto [begin, end] = pieces[next.fetch_add(1, std::memory_order_relaxed)];
      if (begin == end) break;
      function(context, begin, end);
    }
    // Whoever comes late may have the seat of one that is still at work.
    if (busy) busy[seat].fetch_add(now() - started, std::memory_order_relaxed);
  }
};

// Threads that are awake begin and end a loop without a lock or a system call: one token's experts
// are four loops of some tens of microseconds, and helpers would queue for a lock in each.
class Pool {
 public:
  // Runs the loop on the caller and on up to `helpers` threads; false if the pool is busy.
  bool run(Loop& loop, int helpers) {
    std::unique_lock<std::mutex> owner(owner_, std::try_to_lock);
    if (!owner.owns_lock()) return false;
    grow(helpers);
    loop_ = &loop;
    state_.fetch_add(static_cast<uint32_t>(helpers) << kSeatsShift, std::memory_order_release);
    bell_.fetch_add(1);
    if (sleepers_.load() > 0) futex_wake(&bell_, helpers);
    loop.work(0);
    // Nobody may join any more; late sleepers are not waited for.
    state_.fetch_and(kWorking, std::memory_order_acquire);
    const auto done = [&] { return state_.load(std::memory_order_acquire) == 0; };
    if (!spin_until(done)) sleep_until_done();
    return true;
  }

 private:
  // Of `state_`: how many helpers are at work or look whether they may, and above it how many may.
  static constexpr int kSeatsShift = 16;
  static constexpr uint32_t kWorking = (1u << kSeatsShift) - 1;

  void grow(int helpers) {
    for (; threads_ < helpers; ++threads_) {
      std::thread([this, heard = bell_.load()] { serve(heard); }).detach();
    }
  }

  void serve(uint32_t heard) {
    keep_to_loop_cpus();
    for (;;) {
      wait_for_bell(heard);
      heard = bell_.load();
      if (!has_seat(state_.load(std::memory_order_relaxed))) continue;
      // Again, since the loop may have ended meanwhile. If another has begun, that one will do.
      const uint32_t state = state_.fetch_add(1, std::memory_order_acquire);
      if (has_seat(state)) loop_->work(static_cast<int>(state & kWorking) + 1);
      if (state_.fetch_sub(1) == 1 && owner_sleeps_.load()) futex_wake(&state_, 1);
    }
  }

  static bool has_seat(uint32_t state) { return (state & kWorking) < state >> kSeatsShift; }

  void wait_for_bell(uint32_t heard) {
    const auto rung = [&] { return bell_.load() != heard; };
    if (spin_until(rung)) return;
    sleepers_.fetch_add(1);  // whoever rings after this sees it, or the wait sees the bell
    while (!rung()) futex_wait(&bell_, heard);
    sleepers_.fetch_sub(1);
  }

  void sleep_until_done() {
    owner_sleeps_.store(true);  // whoever leaves last after this sees it, or is seen here
    while (const uint32_t state = state_.load()) futex_wait(&state_, state);
    owner_sleeps_.store(false);
  }

  std::mutex owner_;  // held by the thread whose loop is running
  Loop* loop_ = nullptr;
  int threads_ = 0;
  alignas(kCacheLine) std::atomic<uint32_t> bell_{0};  // rings once a loop
  alignas(kCacheLine) std::atomic<uint32_t> state_{0};
  alignas(kCacheLine) std::atomic<int> sleepers_{0};
  std::atomic<bool> owner_sleeps_{false};
};

// Never destroyed: detached threads may outlive the static objects at exit. After fork() the child
// has no helper threads and possibly locked mutexes, so it starts with a fresh pool.
Pool* pool = nullptr;

Pool& the_pool() {
  static std::once_flag once;
  std::call_once(once, [] {
    pool = new Pool;
    pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });
  });
  return *pool;
}

int default_threads() {
  const std::string text = environment_word("FD_LITE_NUM_THREADS");
  if (text.empty()) {
    const int quota = cpu_quota("/proc/self/cgroup", "/sys/fs/cgroup");
    const int cpus = static_cast<int>(loop_cpus().size());
    return quota > 0 ? std::min(quota, cpus) : cpus;
  }
  char* end = nullptr;
  const long count = std::strtol(text.c_str(), &end, 10);
  if (*end != 0 || count < 1 || count > kMostThreads) {
    throw std::invalid_argument("FD_LITE_NUM_THREADS is '" + text +
                                "', expected a number from 1 to 4096");
  }
  return static_cast<int>(count);
}

// False if the pool is busy.
bool share(Loop& loop, int workers) {
  if (!loops_are_timed()) return the_pool().run(loop, workers - 1);
  std::vector<std::atomic<int64_t>> busy(workers);
  for (auto& each : busy) each.store(0, std::memory_order_relaxed);
  loop.busy = busy.data();
  const int64_t started = now();
  if (!the_pool().run(loop, workers - 1)) return false;
  add_loop_times(now() - started, {busy.begin(), busy.end()});
  return true;
}

std::atomic<int> threads{0};  // 0 = not decided yet
thread_local bool inside_loop = false;

}  // namespace

const std::vector<int>& loop_cpus() {
  static const std::vector<int> cpus = performance_cpus("/sys/devices", allowed_cpus());
  return cpus;
}

int num_threads() {
  int count = threads.load(std::memory_order_relaxed);
  if (count == 0) {
    count = default_threads();
    threads.store(count, std::memory_order_relaxed);
  }
  return count;
}

void set_num_threads(int count) {
  if (count < 1) {
    throw std::invalid_argument("number of threads is " + std::to_string(count) +
                                ", expected at least 1");
  }
  threads.store(count, std::memory_order_relaxed);
}

void set_loop_patience(int microseconds) {
  if (microseconds < 0 || microseconds > 10000) {
    throw std::invalid_argument("patience is " + std::to_string(microseconds) +
                                " microseconds, expected 0 to 10000");
  }
  patience.store(microseconds, std::memory_order_relaxed);
}

void parallel_range(int64_t count, int64_t grain, RangeFunction function, void* context) {
  if (count <= 0) return;
  grain = std::max<int64_t>(grain, 1);
  const int64_t pieces = (count + grain - 1) / grain;
  const int workers = static_cast<int>(std::min<int64_t>({num_threads(), pieces, kMostThreads}));
  if (workers > 1 && !inside_loop) {
    Loop loop(function, context, count, grain, workers);
    inside_loop = true;
    const bool done = share(loop, workers);
    inside_loop = false;
    if (done) return;
  }
  function(context, 0, count);
}

}  // namespace fd

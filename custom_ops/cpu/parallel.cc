#include "parallel.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cpu_quota.h"
#include "cpu_topology.h"
#include "environment.h"
#include "loop_times.h"
#include "relax.h"

namespace fd {
namespace {

// Long enough to bridge the Python code between two ops of a step (tens of microseconds would be
// felt by other processes on a shared core), short against a sleeping thread's wake-up (~50 us).
std::atomic<int> patience{20};  // microseconds

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
  RangeFunction function;
  void* context;
  int64_t count;
  int64_t chunk;
  int64_t* busy = nullptr;  // per thread, where the loop is timed
  std::atomic<int64_t> next{0};

  void work(int seat) {
    const int64_t started = busy ? now() : 0;
    for (;;) {
      const int64_t begin = next.fetch_add(chunk, std::memory_order_relaxed);
      if (begin >= count) break;
      function(context, begin, std::min(begin + chunk, count));
    }
    if (busy) busy[seat] = now() - started;
  }
};

class Pool {
 public:
  // Runs the loop on the caller and on up to `helpers` threads; false if the pool is busy.
  bool run(Loop& loop, int helpers) {
    std::unique_lock<std::mutex> owner(owner_, std::try_to_lock);
    if (!owner.owns_lock()) return false;
    grow(helpers);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      loop_ = &loop;
      seats_ = helpers;
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    loop.work(0);
    std::unique_lock<std::mutex> lock(mutex_);
    loop_ = nullptr;  // nobody may join any more; late sleepers are not waited for
    lock.unlock();
    if (!spin_until([&] { return running_.load(std::memory_order_acquire) == 0; })) {
      lock.lock();
      finished_.wait(lock, [&] { return running_.load(std::memory_order_acquire) == 0; });
    }
    return true;
  }

 private:
  void grow(int helpers) {
    while (static_cast<int>(threads_) < helpers) {
      std::thread([this] { serve(); }).detach();
      ++threads_;
    }
  }

  void serve() {
    keep_to_loop_cpus();
    uint64_t seen = 0;
    for (;;) {
      auto changed = [&] { return generation_.load(std::memory_order_acquire) != seen; };
      spin_until(changed);
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, changed);
      seen = generation_.load(std::memory_order_relaxed);
      if (loop_ == nullptr || seats_ == 0) continue;
      Loop& loop = *loop_;
      const int seat = seats_--;
      running_.fetch_add(1, std::memory_order_relaxed);
      lock.unlock();
      loop.work(seat);
      lock.lock();
      if (running_.fetch_sub(1, std::memory_order_release) == 1) finished_.notify_one();
    }
  }

  std::mutex owner_;  // held by the thread whose loop is running
  std::mutex mutex_;  // guards loop_, seats_ and the sleepers
  std::condition_variable wake_, finished_;
  std::atomic<uint64_t> generation_{0};
  std::atomic<int> running_{0};
  Loop* loop_ = nullptr;
  int seats_ = 0;
  int threads_ = 0;
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
  if (*end != 0 || count < 1 || count > 4096) {
    throw std::invalid_argument("FD_LITE_NUM_THREADS is '" + text +
                                "', expected a number from 1 to 4096");
  }
  return static_cast<int>(count);
}

// False if the pool is busy.
bool share(Loop& loop, int workers) {
  if (!loops_are_timed()) return the_pool().run(loop, workers - 1);
  std::vector<int64_t> busy(workers, 0);
  loop.busy = busy.data();
  const int64_t started = now();
  if (!the_pool().run(loop, workers - 1)) return false;
  add_loop_times(now() - started, busy);
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
  const int workers = static_cast<int>(std::min<int64_t>(num_threads(), pieces));
  if (workers > 1 && !inside_loop) {
    // Four pieces a thread even out unequal speeds; a piece is never smaller than the grain.
    Loop loop{function, context, count, std::max(grain, count / (4 * workers))};
    inside_loop = true;
    const bool done = share(loop, workers);
    inside_loop = false;
    if (done) return;
  }
  function(context, 0, count);
}

}  // namespace fd

#include "loop_times.h"

#include <algorithm>
#include <atomic>
#include <mutex>
#include <numeric>

namespace fd {
namespace {

std::atomic<bool> timed{false};
std::mutex guard;
LoopTimes sums;

}  // namespace

void time_loops(bool on) { timed.store(on, std::memory_order_relaxed); }

bool loops_are_timed() { return timed.load(std::memory_order_relaxed); }

LoopTimes loop_times() {
  const std::lock_guard<std::mutex> lock(guard);
  const LoopTimes found = sums;
  sums = {};
  return found;
}

void add_loop_times(int64_t wall, const std::vector<int64_t>& busy) {
  const int64_t total = std::accumulate(busy.begin(), busy.end(), int64_t{0});
  const std::lock_guard<std::mutex> lock(guard);
  ++sums.loops;
  sums.wall += wall;
  sums.slowest += *std::max_element(busy.begin(), busy.end());
  sums.fastest += *std::min_element(busy.begin(), busy.end());
  sums.mean += total / static_cast<int64_t>(busy.size());
}

}  // namespace fd

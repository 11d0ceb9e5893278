#include "loop_times.h"

#include <algorithm>
#include <atomic>
#include <mutex>
#include <numeric>
#include <utility>

namespace fd {
namespace {

std::atomic<bool> timed{false};
std::mutex guard;
std::vector<LoopTimes> seen;

}  // namespace

void time_loops(bool on) { timed.store(on, std::memory_order_relaxed); }

bool loops_are_timed() { return timed.load(std::memory_order_relaxed); }

std::vector<LoopTimes> loop_times() {
  const std::lock_guard<std::mutex> lock(guard);
  return std::exchange(seen, {});
}

void add_loop_times(int64_t wall, const std::vector<int64_t>& busy) {
  const int64_t total = std::accumulate(busy.begin(), busy.end(), int64_t{0});
  const std::lock_guard<std::mutex> lock(guard);
  if (seen.size() == kMostLoopTimes) return;
  const auto [fastest, slowest] = std::minmax_element(busy.begin(), busy.end());
  seen.push_back({wall, *slowest, *fastest, total / static_cast<int64_t>(busy.size())});
}

}  // namespace fd

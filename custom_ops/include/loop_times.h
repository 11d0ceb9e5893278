// Where the time of shared loops goes: a clock beside the pool of threads, off unless asked for.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace fd {

// A loop that was shared among threads; times in nanoseconds. A thread is busy from its first piece
// of the loop to its last.
struct LoopTimes {
  int64_t wall;     // on the thread that began the loop, waking and waiting included
  int64_t slowest;  // busy time of the busiest thread
  int64_t fastest;  // of the least busy one; 0 if a thread came too late
  int64_t mean;     // of all threads that were asked for
};
// Loops that are remembered until somebody looks; those after them are not.
constexpr size_t kMostLoopTimes = 4096;

// Whether loops are timed from now on: two looks at a clock a thread and loop.
void time_loops(bool on);
bool loops_are_timed();
// The loops since the last call, in their order.
std::vector<LoopTimes> loop_times();
// Adds one loop that took `wall`; `busy` has one entry a thread that was asked for.
void add_loop_times(int64_t wall, const std::vector<int64_t>& busy);

}  // namespace fd

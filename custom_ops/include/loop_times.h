// Where the time of shared loops goes: a clock beside the pool of threads, off unless asked for.
#pragma once

#include <cstdint>
#include <vector>

namespace fd {

// Sums over the loops that were shared among threads since loop_times() was called last; times in
// nanoseconds. A thread is busy from its first piece of a loop to its last.
struct LoopTimes {
  int64_t loops = 0;
  int64_t wall = 0;     // on the thread that began the loop, waking and waiting included
  int64_t slowest = 0;  // busy time of the busiest thread of each loop
  int64_t fastest = 0;  // of the least busy one; 0 in loops that a thread came too late for
  int64_t mean = 0;     // of all threads that were asked for
};

// Whether loops are timed from now on: two looks at a clock a thread and loop.
void time_loops(bool on);
bool loops_are_timed();
// The sums, which begin anew.
LoopTimes loop_times();
// Adds one loop that took `wall`; `busy` has one entry a thread that was asked for.
void add_loop_times(int64_t wall, const std::vector<int64_t>& busy);

}  // namespace fd

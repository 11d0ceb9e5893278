// A loop over a range, shared among a small pool of threads.
//
// The pool is our own and not OpenMP because (1) a process that also loads Paddle would hold two
// OpenMP run-times, whose idle threads spin against each other; (2) idle threads here sleep after
// some microseconds, so that several processes can share the cores; (3) the pool survives fork().
// No result depends on the number of threads: a unit of the range is computed whole by one thread.
// How the range is cut: loop_pieces.h.
#pragma once

#include <cstdint>
#include <vector>

namespace fd {

// CPUs for loops: those in the affinity mask of the process, of different ones the fast
// (performance_cpus).
const std::vector<int>& loop_cpus();
// Threads that a loop may use, the caller included: set_num_threads(), else FD_LITE_NUM_THREADS,
// else as many as loop_cpus(), no more than the control groups of the process grant.
int num_threads();
// At least 1, else std::invalid_argument.
void set_num_threads(int count);
// How long an idle thread looks for the next loop before it sleeps, 0 to 10,000 microseconds, else
// std::invalid_argument; 20 unless said otherwise.
void set_loop_patience(int microseconds);

// A piece of a loop: units [begin, end). Must not throw.
using RangeFunction = void (*)(void* context, int64_t begin, int64_t end);
void parallel_range(int64_t count, int64_t grain, RangeFunction function, void* context);

// Calls function(begin, end) for disjoint pieces that cover [0, count). `grain` is the number of
// units worth handing to a thread (a dispatch costs some microseconds: aim at 10 us of work or
// more); a loop of at most `grain` units runs on the caller. Loops started while another thread's
// loop is running, and loops inside loops, run on their caller.
template <typename Function>
void parallel_for(int64_t count, int64_t grain, const Function& function) {
  parallel_range(
      count, grain,
      [](void* context, int64_t begin, int64_t end) {
        (*static_cast<const Function*>(context))(begin, end);
      },
      const_cast<Function*>(&function));
}

}  // namespace fd

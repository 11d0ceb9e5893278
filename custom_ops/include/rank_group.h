// Sums and gathers between the processes of one host that share each layer ("ranks").
//
// All of it lies in one piece of memory that every rank has mapped. A rank puts its numbers in a
// buffer of its own, says so, waits until all have, and adds all buffers in the order of the ranks:
// the same bits on every rank, on every run, and whatever else is in the batch. Buffers come in
// pairs, so that nobody writes where another may still read.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

namespace fd {

class RankGroup {
 public:
  static constexpr int kMostRanks = 64;

  enum class Outcome : int {
    kDone = 0,
    kFailed = 1,    // a rank has said that this step failed
    kLost = 2,      // somebody has said that a rank is gone
    kTimedOut = 3,  // a rank did not come
  };

  // `memory`: at least bytes(ranks, floats), zero at first, page-aligned, mapped by every rank.
  // `floats`: size of each buffer. Throws std::invalid_argument.
  RankGroup(void* memory, int rank, int ranks, int64_t floats);
  static int64_t bytes(int ranks, int64_t floats);

  // x = the sum of every rank's x.
  Outcome all_reduce(float* x, int64_t count, double seconds);
  // out [rows, sum of widths] = the ranks' x [rows, widths[rank]] side by side.
  Outcome all_gather(const float* x, int64_t rows, const std::vector<int64_t>& widths, float* out,
                     double seconds);
  // Shows that this rank comes on in a step whose sums are made elsewhere.
  void advance();
  // Ends a step: waits for all ranks and begins the next step; kFailed if one had `sound` false.
  Outcome agree(bool sound, double seconds);
  // Says that the current step has failed here: ranks that wait inside it give up.
  void fail();
  // Says that a rank is gone: whoever waits, or begins to, gives up. Never taken back.
  void lose();
  // Whether somebody has said so.
  bool is_lost() const;
  // Whether a rank has said that a step failed which this rank has not ended yet; for whoever
  // watches.
  bool is_failing() const;

  // Of each rank, a number that grows with each of its arrivals; for whoever watches.
  std::vector<uint64_t> arrivals() const;

 private:
  struct Shared;

  float* buffer(int rank) const;
  void arrive();
  template <typename Ready>
  Outcome wait(const Ready& ready, bool inside_step, double seconds);
  Outcome wait_for_all(double seconds);
  void ring();

  Shared* shared_;
  float* buffers_;
  int rank_, ranks_;
  int64_t floats_;
  uint64_t step_ = 1, operation_ = 0, advanced_ = 0;
};

}  // namespace fd

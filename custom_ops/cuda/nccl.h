// Sums and gathers between the cards of one host, over NCCL.
//
// NCCL is opened at run time, as cuBLASLt is: the module loads, and one card computes, without it.
// A sum has the same bits on every rank, on every run and wherever a row lies in the batch. NCCL's
// own all-reduce promises that for two ranks only, where a + b is one rounding in whatever order;
// its rings begin at another rank for each piece of a message. So more ranks exchange what they
// have and each adds in the order of the ranks, in float32, with one rounding at the end.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "peer_sums.h"

namespace fd::cuda {

/// Opens libnccl.so.2 from a path or by name; throws when it cannot be used. Once a process.
void nccl_open(const std::string& path);
/// Its version, such as 22803 for 2.28.3.
int nccl_version();
/// A name for a new group, kNcclIdBytes long; the process that makes it is where the others meet.
std::string nccl_unique_id();
constexpr int kNcclIdBytes = 128;

/// One rank's end of a group. All ranks call the same functions in the same order; work is queued
/// on the stream and may be captured into a graph.
class NcclGroup {
 public:
  /// Returns when all ranks have called it.
  NcclGroup(const std::string& id, int rank, int ranks, int device);

  /// x = the sum of every rank's x, bf16 or float32. `scratch` is free again behind the call.
  void all_reduce(void* x, bool is_float, int64_t count, void* scratch, int64_t scratch_bytes,
                  cudaStream_t stream);
  /// out [rows, ranks * width] = the ranks' x [rows, width] side by side, all float32.
  void all_gather(const float* x, int64_t rows, int64_t width, float* out, void* scratch,
                  int64_t scratch_bytes, cudaStream_t stream);

  /// Lets small sums go through memory that the cards read of each other, see peer_sums.h. All
  /// ranks call it; whether all can.
  bool share_memory();

  /// Whether to add in the order of the ranks where NCCL's sum has the same bits.
  void set_order(bool in_order) { in_order_ = in_order || ranks_ > 2; }
  /// Whether small sums go through shared memory, where there is any.
  void set_sharing(bool sharing) { sharing_ = sharing && can_share_; }

  /// Ends every kernel of the group that runs, leaving nothing in its place; the group is of no use
  /// any more. From any thread, returns at once.
  void abort();
  bool aborted() const { return aborted_; }
  /// Whether nothing is left of an aborted group. The process should not end before.
  bool ended() const { return *ended_; }
  /// Waits until the stream has nothing left to do; false after `seconds` or once aborted.
  bool wait_idle(double seconds, cudaStream_t stream) const;

 private:
  std::vector<std::string> gather_words(const std::string& own);
  void enqueue_sum(char* x, bool is_float, int64_t count, void* scratch, int64_t room,
                   cudaStream_t stream);
  std::unique_lock<std::timed_mutex> enter(cudaStream_t stream);
  void stay_near(cudaStream_t stream);

  void* group_ = nullptr;
  std::shared_ptr<std::timed_mutex> calling_ = std::make_shared<std::timed_mutex>();
  int rank_, ranks_, device_;
  bool in_order_;
  std::unique_ptr<PeerSums> peers_;
  bool can_share_ = false, sharing_ = false;
  std::atomic<bool> aborted_{false};
  std::shared_ptr<std::atomic<bool>> ended_ = std::make_shared<std::atomic<bool>>(false);
  std::vector<cudaEvent_t> behind_;
  uint64_t calls_ = 0;
};

/// out[i] = sum over ranks, in their order, of parts[rank * count + i]; float32 sums, one rounding.
void sum_of_ranks(const void* parts, bool is_float, int ranks, int64_t count, void* out,
                  cudaStream_t stream);
/// out [rows, ranks * width] from parts [ranks, rows, width].
void side_by_side(const float* parts, int ranks, int64_t rows, int64_t width, float* out,
                  cudaStream_t stream);

}  // namespace fd::cuda

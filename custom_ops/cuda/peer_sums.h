// Sums of a few rows between the cards of one host, by one kernel that reads the others' memory.
//
// NCCL takes 7 us for a row of 8,192 numbers, twice a layer. Here each card maps memory of all
// others (CUDA IPC) and adds in the order of the ranks: the bits are those of `sum_of_ranks`. The
// numbers come in one of two ways. Few are sent as messages, every word with the call's number
// beside it, twice the bytes and one way across. More are put into the card's own memory for the
// others to fetch, once a signal has come across.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <string>
#include <vector>

namespace fd::cuda {

constexpr int kMostPeers = 8;
constexpr int kMostPeerBlocks = 64;
/// Larger sums go another way: here every card reads all numbers of all others.
constexpr int64_t kPeerBytes = int64_t{1} << 20;
/// Sums up to here are sent as messages.
constexpr int64_t kMessageBytes = int64_t{1} << 17;

/// What a card shares with the others. Behind it lie two slots of kPeerBytes of its own numbers,
/// and two for each rank of messages from it.
struct alignas(256) PeerHead {
  unsigned said[kMostPeers][kMostPeerBlocks];  // the call that a block of a rank has come to
  unsigned calls;                              // that have ended here
  unsigned ended_blocks;                       // of the call under way
};

constexpr int64_t kPeerMemoryBytes =
    sizeof(PeerHead) + 2 * kPeerBytes + 2 * kMostPeers * 2 * kMessageBytes;

/// A sum under way: x [vectors], in place; heads of all ranks as this card sees them.
struct PeerJob {
  uint4* x;
  int64_t vectors;
  int rank, ranks;
  PeerHead* heads[kMostPeers];
  const unsigned* is_aborted;  // in the host's memory
};

/// One rank's end. All ranks make the same sums in the same order, on one stream each.
class PeerSums {
 public:
  /// Takes memory on the current card; without it `connect` says false.
  PeerSums(int rank, int ranks);
  ~PeerSums();
  PeerSums(const PeerSums&) = delete;
  PeerSums& operator=(const PeerSums&) = delete;

  /// What the others need to map this rank's memory, kPeerNameBytes long.
  std::string name() const;
  /// Maps the others'; false: they cannot be reached, and nothing may be summed here.
  bool connect(const std::vector<std::string>& names);

  /// Whether a sum goes this way; the same on all ranks.
  bool takes(const void* x, bool is_float, int64_t count) const;
  void all_reduce(void* x, int64_t count, cudaStream_t stream);
  /// Ends the waits of every kernel that runs. From any thread.
  void abort();

 private:
  PeerJob job_{};
  unsigned* is_aborted_ = nullptr;
  int device_ = -1;
  bool connected_ = false;
};

constexpr int kPeerNameBytes = 128;

}  // namespace fd::cuda

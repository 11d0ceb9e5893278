#include <algorithm>
#include <memory>
#include <vector>

#include "../cuda/peer_sums.cuh"
#include "peers.h"

namespace fd::cuda {
namespace {

struct Peers {
  uint4* numbers;
  int64_t stride;
  int ranks, sums, most_sent;
  const int* vectors;
  PeerHead* heads[kMostPeers];
  unsigned* ended;
  const unsigned* is_aborted;
};

/// A row of blocks is a card. What a card begins next, it begins when all its blocks have ended.
__global__ void peers_kernel(Peers peers) {
  const int rank = blockIdx.y;
  for (int i = 0; i < peers.sums; ++i) {
    PeerJob job{};
    const int number = rank * peers.sums + i;
    job.x = peers.numbers + number * peers.stride;
    job.vectors = peers.vectors[i];
    job.rank = rank;
    job.ranks = peers.ranks;
    std::copy_n(peers.heads, kMostPeers, job.heads);
    job.is_aborted = peers.is_aborted;
    const unsigned blocks =
        std::min<unsigned>(gridDim.x, ceil_div(peers.vectors[i], int(blockDim.x)));
    if (blockIdx.x < blocks) {
      const bool sends = peers.vectors[i] <= peers.most_sent;
      sends ? sum_by_messages(job, blockIdx.x, blocks) : sum_with_peers(job, blockIdx.x, blocks);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      add_release(peers.ended + number, 1);
      while (load_acquire(peers.ended + number) < gridDim.x) {
      }
    }
    __syncthreads();
  }
}

}  // namespace
}  // namespace fd::cuda

namespace card {

void sum_peers(uintptr_t numbers, int64_t stride, int ranks, const std::vector<int>& vectors,
               int most_sent, int blocks, int threads) {
  using namespace fd::cuda;
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  std::vector<std::unique_ptr<void, Free>> memories;
  Peers peers{};
  for (int rank = 0; rank < ranks; ++rank) {
    memories.emplace_back(std::aligned_alloc(alignof(PeerHead), kPeerMemoryBytes));
    std::memset(memories.back().get(), 0, kPeerMemoryBytes);
    peers.heads[rank] = static_cast<PeerHead*>(memories.back().get());
  }
  std::vector<unsigned> ended(ranks * vectors.size());
  const unsigned is_aborted = 0;
  peers.numbers = reinterpret_cast<uint4*>(numbers);
  peers.stride = stride;
  peers.ranks = ranks;
  peers.sums = static_cast<int>(vectors.size());
  peers.most_sent = most_sent;
  peers.vectors = vectors.data();
  peers.ended = ended.data();
  peers.is_aborted = &is_aborted;
  card_launch(dim3(blocks, ranks), dim3(threads), 0, true, peers_kernel, peers);
}

}  // namespace card

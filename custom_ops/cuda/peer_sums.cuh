// The kernel of peer_sums.h, block by block.
#pragma once

#include "common.cuh"
#include "eight_sums.cuh"
#include "peer_sums.h"

namespace fd::cuda {

constexpr int kLooksBetweenAborts = 1024;  // a look at the host's memory takes about a microsecond

__device__ __forceinline__ uint8_t* behind(PeerHead* head) {
  return reinterpret_cast<uint8_t*>(head) + sizeof(PeerHead);
}

__device__ __forceinline__ uint4* peer_slot(PeerHead* head, unsigned call) {
  return reinterpret_cast<uint4*>(behind(head) + (call & 1) * kPeerBytes);
}

/// Where messages from a rank arrive, two for a vector.
__device__ __forceinline__ ulonglong2* message_slot(PeerHead* head, unsigned call, int from) {
  const int64_t slot = (call & 1) * kMostPeers + from;
  return reinterpret_cast<ulonglong2*>(behind(head) + 2 * kPeerBytes + slot * 2 * kMessageBytes);
}

/// Waits until the block of every rank has put its numbers there.
__device__ __forceinline__ void meet_peers(const PeerJob& job, unsigned block, unsigned call) {
  const unsigned peer = threadIdx.x;
  if (peer >= static_cast<unsigned>(job.ranks)) return;
  store_release_system(&job.heads[peer]->said[job.rank][block], call);
  const unsigned* const said = &job.heads[job.rank]->said[peer][block];
  for (int looks = 1; static_cast<int>(load_acquire_system(said) - call) < 0; ++looks) {
    if (looks % kLooksBetweenAborts == 0 && load_acquire_system(job.is_aborted) != 0) break;
  }
}

/// A call under way, and which vectors of it are a thread's: every `step`-th from `first` on.
struct PeerCall {
  PeerHead* own;
  unsigned call;
  int64_t step, first;
};

__device__ __forceinline__ PeerCall begin_call(const PeerJob& job, unsigned block,
                                               unsigned blocks) {
  PeerHead* const own = job.heads[job.rank];
  return {own, own->calls + 1, int64_t{blocks} * blockDim.x,
          int64_t{block} * blockDim.x + threadIdx.x};
}

/// Counts a call that has ended in all blocks; all threads of this one have read how many there
/// were.
__device__ __forceinline__ void end_call(PeerHead* own, unsigned call, unsigned blocks) {
  if (threadIdx.x == 0 && increment(&own->ended_blocks, blocks - 1) == blocks - 1) {
    own->calls = call;
  }
}

/// A block's share. Slots are used in turn, so that nobody waits for others to have read: whoever
/// puts numbers into a slot again has met all ranks in the call between, and a rank begins a call
/// only when the one before has ended in all its blocks.
__device__ __forceinline__ void sum_with_peers(const PeerJob& job, unsigned block,
                                               unsigned blocks) {
  const PeerCall at = begin_call(job, block, blocks);
  uint4* const mine = peer_slot(at.own, at.call);
  for (int64_t i = at.first; i < job.vectors; i += at.step) __stcg(mine + i, job.x[i]);
  __syncthreads();
  meet_peers(job, block, at.call);
  __syncthreads();
  for (int64_t i = at.first; i < job.vectors; i += at.step) {
    uint4 parts[kMostPeers];
#pragma unroll
    for (int rank = 0; rank < kMostPeers; ++rank) {  // all on their way before the first is added
      if (rank < job.ranks) parts[rank] = __ldcg(peer_slot(job.heads[rank], at.call) + i);
    }
    EightSums sum(parts[0]);
#pragma unroll
    for (int rank = 1; rank < kMostPeers; ++rank) {
      if (rank < job.ranks) sum.add(parts[rank]);
    }
    job.x[i] = sum.rounded();
  }
  end_call(at.own, at.call, blocks);
}

__device__ __forceinline__ void send(ulonglong2* to, const uint4& v, unsigned call) {
  const uint64_t mark = uint64_t{call} << 32;
  store_pairs_system(to, mark | v.x, mark | v.y);
  store_pairs_system(to + 1, mark | v.z, mark | v.w);
}

/// Two words of a message, once both are of this call.
__device__ __forceinline__ uint2 receive(const PeerJob& job, const ulonglong2* from,
                                         unsigned call) {
  uint64_t pairs[2];
  for (int looks = 1;; ++looks) {
    load_pairs_system(from, pairs);
    if (pairs[0] >> 32 == call && pairs[1] >> 32 == call) break;
    if (looks % kLooksBetweenAborts == 0 && load_acquire_system(job.is_aborted) != 0) break;
  }
  return make_uint2(static_cast<unsigned>(pairs[0]), static_cast<unsigned>(pairs[1]));
}

/// As sum_with_peers. A slot is free again for the same reason: messages of the call between have
/// come from all ranks.
__device__ __forceinline__ void sum_by_messages(const PeerJob& job, unsigned block,
                                                unsigned blocks) {
  const PeerCall at = begin_call(job, block, blocks);
  for (int64_t i = at.first; i < job.vectors; i += at.step) {
    const uint4 mine = job.x[i];
    for (int peer = 0; peer < job.ranks; ++peer) {
      if (peer == job.rank) continue;
      send(message_slot(job.heads[peer], at.call, job.rank) + 2 * i, mine, at.call);
    }
  }
  for (int64_t i = at.first; i < job.vectors; i += at.step) {
    const auto part = [&](int rank) {
      if (rank == job.rank) return job.x[i];
      const ulonglong2* const from = message_slot(at.own, at.call, rank) + 2 * i;
      const uint2 low = receive(job, from, at.call), high = receive(job, from + 1, at.call);
      return make_uint4(low.x, low.y, high.x, high.y);
    };
    EightSums sum(part(0));
    for (int rank = 1; rank < job.ranks; ++rank) sum.add(part(rank));
    job.x[i] = sum.rounded();
  }
  __syncthreads();
  end_call(at.own, at.call, blocks);
}

}  // namespace fd::cuda

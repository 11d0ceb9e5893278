// Who does what in the persistent kernel (stream.cuh): slots sorted into groups, and the chunks of
// every warp in the order in which it takes them.
#pragma once

#include "expert_weight.h"
#include "experts.h"
#include "stream_shape.h"

namespace fd::cuda::stream {

/// Experts in use, each with at most kStreamGroup of its slots.
struct Groups {
  int count;
  int expert[kStreamSlots];
  int first[kStreamSlots + 1];  // into slots and tokens
  int slots[kStreamSlots];
  int tokens[kStreamSlots];
  int cost[kStreamSlots + 1];  // of a chunk of all groups before; the last one: of all

  __device__ int rows(int group) const { return first[group + 1] - first[group]; }
  __device__ int cost_of(int group) const { return cost[group + 1] - cost[group]; }
};

/// Sorts the slots by expert and cuts runs of an expert into groups. All threads. A group has no
/// more slots than there are tokens: that is what rows of x have room for, whatever the ids are.
/// `experts`: room for kStreamSlots numbers.
__device__ inline void find_groups(const ExpertsCall& call, Groups& groups, int* experts) {
  __shared__ unsigned starts[kStreamSlots / 32];  // a bit for each sorted slot that begins a group
  const int slots = call.tokens * call.top_k, i = threadIdx.x;
  const int most = min(call.tokens, kStreamGroup);
  if (i < slots) experts[i] = __ldcg(call.ids + i);
  if (i < kStreamSlots / 32) starts[i] = 0;
  __syncthreads();
  int rank = 0, place = 0;
  const int mine = i < slots ? experts[i] : 0;
  if (i < slots) {
#pragma unroll 8
    for (int j = 0; j < slots; ++j) {
      const int other = experts[j];
      const bool before = other == mine && j < i;
      rank += other < mine || before;
      place += before;
    }
    groups.slots[rank] = i;
    groups.tokens[rank] = i / call.top_k;
    if (place % most == 0) atomicOr(&starts[rank / 32], 1u << rank % 32);
  }
  __syncthreads();
  if (i < slots && place % most == 0) {
    int before = __popc(starts[rank / 32] & ((1u << rank % 32) - 1));
    for (int w = 0; w < rank / 32; ++w) before += __popc(starts[w]);
    groups.expert[before] = mine;
    groups.first[before] = rank;
  }
  if (i == 0) {
    int total = 0;
    for (int w = 0; w < kStreamSlots / 32; ++w) total += __popc(starts[w]);
    groups.count = total;
    groups.first[total] = slots;
  }
  __syncthreads();
}

/// What a chunk of each group costs, `cost(rows)`, added up. The first warp.
template <typename Cost>
__device__ inline void add_costs(Groups& groups, Cost cost) {
  const int lane = threadIdx.x % kWarp;
  int before = 0;
  for (int first = 0; first < groups.count; first += kWarp) {
    const int group = first + lane;
    int sum = group < groups.count ? cost(groups.rows(group)) : 0;
#pragma unroll
    for (int offset = 1; offset < kWarp; offset *= 2) {
      const int other = __shfl_up_sync(kFullMask, sum, offset);
      if (lane >= offset) sum += other;
    }
    if (group < groups.count) groups.cost[group + 1] = before + sum;
    before += __shfl_sync(kFullMask, sum, kWarp - 1);
  }
  if (lane == 0) groups.cost[0] = 0;
}

/// How one product's chunks, in order of group, block and K, are divided: every warp of the grid
/// gets a run that costs as much as any other. `kEven`: a chunk costs the same in all groups, and
/// Groups::cost is not filled.
template <bool kEven>
struct Shape {
  const Groups& groups;
  int of_block, blocks, of_group;  // in chunks, but for `blocks`
  int warps, total, each, rest;    // of the grid; costs of all and of a warp

  __device__ Shape(const ExpertWeight& w, const Groups& all)
      : groups(all),
        of_block(w.chunks_of_k()),
        blocks(w.blocks()),
        of_group(of_block * blocks),
        warps(gridDim.x * kStreamWarps),
        total(of_group * (kEven ? all.count : all.cost[all.count])),
        each(total / warps),
        rest(total - each * warps) {}

  /// The first chunk of a warp of the grid.
  __device__ int bound(int warp) const {
    const int cost = each * warp + static_cast<int>(static_cast<unsigned>(rest * warp) /
                                                    static_cast<unsigned>(warps));
    if (kEven) return cost;
    if (cost >= total) return groups.count * of_group;
    int group = 0;  // the last one that begins at this cost or before
    for (int above = groups.count; above - group > 1;) {
      const int middle = (group + above) / 2;
      (groups.cost[middle] * of_group <= cost ? group : above) = middle;
    }
    return group * of_group + (cost - groups.cost[group] * of_group) / groups.cost_of(group);
  }

  /// The warp that has a chunk.
  __device__ int owner(int chunk) const {
    const int cost = cost_before(chunk);
    int warp = min(static_cast<int>(__fdividef(cost, total) * warps), warps - 1);
    while (bound(warp) > chunk) --warp;
    while (bound(warp + 1) <= chunk) ++warp;
    return warp;
  }

 private:
  __device__ int cost_before(int chunk) const {
    if (kEven) return chunk;
    const int group = chunk / of_group;
    return groups.cost[group] * of_group + (chunk - group * of_group) * groups.cost_of(group);
  }
};

/// The groups of a block of the grid in one product; `last` < `first`: none.
struct Share {
  int first, last;
};

/// Groups of a block's share whose rows it holds at once.
struct Round {
  int first = 0, last = -1;

  /// Moves on; false behind the last one. `most`: rows.
  __device__ bool next(const Share& share, const Groups& groups, int most) {
    first = last < 0 ? share.first : last + 1;
    if (first > share.last) return false;
    last = first;
    while (last < share.last && groups.first[last + 2] - groups.first[first] <= most) ++last;
    return true;
  }
};

/// Part of a warp's run, as up to three ranges in the order described above.
struct Walk {
  int begin[3], end[3];

  __device__ Walk(int from, int to, int of_block) {
    const int whole_from = (from + of_block - 1) / of_block * of_block;
    const int whole_to = to / of_block * of_block;
    const bool inside = whole_from > whole_to;  // all of it in one block, touching neither end
    begin[0] = inside ? to : max(whole_to, from);
    end[0] = to;
    begin[1] = whole_from;
    end[1] = inside ? whole_from : whole_to;
    begin[2] = from;
    end[2] = inside ? to : min(whole_from, to);
  }
};

/// A warp's chunks that lie behind each other in memory: of one round, range and group. A run is
/// cheaper than any group, so that it crosses into another one once at most: one range is cut.
struct Stretch {
  int begin, end, group;
};
constexpr int kMostStretches = 4;

/// Lists a warp's stretches of one round behind the `count` that it has; the new count.
template <typename Shape>
__device__ inline int list_stretches(const Shape& shape, const Round& round, int from, int to,
                                     Stretch* stretches, int count) {
  from = max(from, round.first * shape.of_group);
  to = min(to, (round.last + 1) * shape.of_group);
  if (from >= to) return count;
  const Walk walk(from, to, shape.of_block);
#pragma unroll
  for (int range = 0; range < 3; ++range) {
    int begin = walk.begin[range];
    while (begin < walk.end[range]) {
      const int group = begin / shape.of_group;
      const int end = min(walk.end[range], (group + 1) * shape.of_group);
      if (count < kMostStretches) stretches[count] = {begin, end, group};
      ++count;
      begin = end;
    }
  }
  return count;
}

}  // namespace fd::cuda::stream

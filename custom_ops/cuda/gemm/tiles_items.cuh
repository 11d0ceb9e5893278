// What the persistent kernels over sorted rows share: how a block draws its work and cuts weights.
#pragma once

#include "jobs.cuh"
#include "ring.cuh"

namespace fd::cuda {

namespace tiles {

constexpr int kItems = 4;  // drawn ahead

/// Weights that one bulk copy brings: about 2 KB of a block.
template <Coding kCoding>
struct Slot {
  static constexpr int kTiles = kChunkTiles / lane_vectors(kCoding);
  static constexpr int kBytes = scale_bytes(kCoding) + kTiles * tile_size(kCoding);
  static constexpr int kPerChunk = kChunkTiles / kTiles;
};

/// A tile of rows by a run of column blocks.
struct Item {
  int expert, first, count, block;  // block: first of the item's column blocks; -1: no more items
};

/// Items on their way from the warp that draws them to those that work on them.
template <int kRows>
struct ItemRing {
  Item items[kItems];
  int source[kItems][kRows];     // row of x of each of the item's rows
  float inverse[kItems][kRows];  // and 1 / x_scale of it
  uint64_t full[kItems], free[kItems];

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  /// `takers`: warps; `arrivals` of each: see warp_arrive().
  __device__ void init(int takers, int arrivals) {
    for (int i = 0; i < kItems; ++i) {
      barrier_init(shared_address(&full[i]), arrivals);
      barrier_init(shared_address(&free[i]), takers * arrivals);
    }
  }

  /// Waits for the place of the next item. All lanes of the drawing warp; so is hand_on().
  __device__ void wait_free(const RingPlace& place) {
    barrier_wait(shared_address(&free[place.slot]), place.parity);
  }
  __device__ void hand_on(const Item& item, RingPlace& place, int arrivals) {
    if (threadIdx.x % kWarp == 0) items[place.slot] = item;
    warp_arrive(shared_address(&full[place.slot]), arrivals);
    place.next(kItems);
  }

  /// The next item, which stays where it is until release(): registers are scarce.
  __device__ const Item& take(const RingPlace& place) {
    barrier_wait(shared_address(&full[place.slot]), place.parity);
    return items[place.slot];
  }
  /// Lets go of the item, its inverse scales too. Once a warp that takes.
  __device__ void release(RingPlace& place, int arrivals) {
    warp_arrive(shared_address(&free[place.slot]), arrivals);
    place.next(kItems);
  }
#endif
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/// Draws the next item of the tall tiles or of the others, for a whole warp.
template <bool kTall, int kBlocks>
__device__ __forceinline__ Item draw_item(const TilesJob& job) {
  const int groups = ceil_div(job.w.blocks(), kBlocks);
  int at = 0;
  if (threadIdx.x % kWarp == 0) at = atomicAdd(job.next_items + (kTall ? 0 : 1), 1);
  at = __shfl_sync(kFullMask, at, 0);
  if (at >= job.tile_counts[kTall ? 0 : 1] * groups) return {0, 0, 0, -1};
  const int4 tile = job.tiles[(kTall ? 0 : job.tile_counts[0]) + at / groups];
  return {tile.x, tile.y, tile.z, at % groups * kBlocks};
}

__device__ __forceinline__ const uint8_t* block_bytes(const ExpertWeight& w, int expert, int block,
                                                      int64_t bytes) {
  return w.chunks + (int64_t{expert} * w.blocks() + min(block, w.blocks() - 1)) * bytes;
}

/// Asks for the numbers of a block's columns, so that the start of an item waits for the L2 cache
/// at most.
template <Coding kCoding>
__device__ __forceinline__ void prefetch_columns(const ExpertWeight& w, int expert, int block) {
  const int64_t column =
      (int64_t{expert} * w.blocks() + min(block, w.blocks() - 1)) * kBlockColumns;
  if constexpr (kCoding == Coding::kCcq) {
    prefetch(w.codes + column);
    prefetch(w.codes + column + kBlockColumns / 2);
  }
  prefetch(w.column_scale + column);
}

/// A warp of its own: draws items, with all that their start would have to wait for.
template <Coding kCoding, bool kTall, int kBlocks, int kRows>
__device__ __forceinline__ void draw_items(const TilesJob& job, ItemRing<kRows>& ring) {
  const int lane = threadIdx.x % kWarp;
  RingPlace place;
  place.parity = 1;
  while (true) {
    const Item item = draw_item<kTall, kBlocks>(job);
    ring.wait_free(place);
    if (item.block >= 0) {
      for (int row = lane; row < item.count; row += kWarp) {
        const int source = source_row(job, item.first + row);
        ring.source[place.slot][row] = source;
        ring.inverse[place.slot][row] = inverse_scale(__ldg(job.x_scale + source));
      }
      if (lane < kBlocks) prefetch_columns<kCoding>(job.w, item.expert, item.block + lane);
    }
    ring.hand_on(item, place, job.arrivals);
    if (item.block < 0) return;
  }
}

/// Whether the fast decoder serves columns `column` and `column + 8` of every lane of the warp.
template <Coding kCoding>
__device__ __forceinline__ bool columns_proven(const ExpertWeight& w, int64_t column) {
  if constexpr (kCoding != Coding::kCcq) return true;
  if (w.proven) return true;
  return __all_sync(kFullMask, __ldg(&w.codes[column].proven) != 0 &&
                                   __ldg(&w.codes[column + 8].proven) != 0) != 0;
}

#endif  // sm_90a

}  // namespace tiles

}  // namespace fd::cuda

// Many rows an expert, on compute capability 9.0: decoded weights as register operands of wgmma.
//
// A persistent block takes items: 16 column blocks (256 columns) of one tile of up to 128 rows.
// Warpgroup 0 feeds: its first warp draws items and has weights copied in bulk, the others copy
// rows of x. Warpgroups 1 and 2 multiply, each 8 column blocks: while the tensor cores work on 32
// rows, the next 32 are decoded.
#pragma once

#include "barrier.cuh"
#include "jobs.cuh"
#include "wgmma.cuh"

namespace fd::cuda {

namespace tiles {

constexpr int kMaxTileTokens = 128;
constexpr int kThreads = 384;
constexpr int kBlocks = 16;  // column blocks of an item
constexpr int kStageK = 64;  // rows of K in a stage of x: 128 bytes, one swizzle
constexpr int kStages = 4;
constexpr int kStageBytes = kMaxTileTokens * kStageK * 2;
constexpr int kSlots = 3;  // of weights
constexpr int kItems = 4;  // items drawn ahead
constexpr int kCopyThreads = 96;
constexpr int kCopyLag = 2;          // stages requested before one is waited for
constexpr int kStagingStride = 144;  // bytes; 64 columns and a shift by one bank group
constexpr int kFeedRegisters = 40;
constexpr int kMultiplyRegisters = 232;

/// Weights that one bulk copy brings: about 2 KB of a block.
template <Coding kCoding>
struct Slot {
  static constexpr int kTiles = kChunkTiles / lane_vectors(kCoding);
  static constexpr int kBytes = scale_bytes(kCoding) + kTiles * tile_size(kCoding);
  static constexpr int kPerChunk = kChunkTiles / kTiles;
};

struct Item {
  int expert, first, count, block;  // block: first of the item's column blocks; -1: no more items
};

template <Coding kCoding>
struct Shared {
  alignas(1024) uint8_t x[kStages][kStageBytes];
  alignas(128) uint8_t weights[kSlots][kBlocks * Slot<kCoding>::kBytes];
  alignas(16) uint8_t staging[2][kMaxTileTokens * kStagingStride];
  Item items[kItems];
  int sources[kMaxTileTokens];  // rows of x of the item whose copies are requested
  uint64_t x_full[kStages], x_free[kStages];
  uint64_t weights_full[kSlots], weights_free[kSlots];
  uint64_t item_full[kItems], item_free[kItems];
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/// Waits for an item and lets go of its place.
template <typename S>
__device__ __forceinline__ Item take_item(S& shared, RingPlace& place) {
  barrier_wait(shared_address(&shared.item_full[place.slot]), place.parity);
  const Item item = shared.items[place.slot];
  __syncwarp();
  if (threadIdx.x % kWarp == 0) barrier_arrive(shared_address(&shared.item_free[place.slot]));
  place.next(kItems);
  return item;
}

/// Warp 0: draws items and keeps the ring of weights full.
template <Coding kCoding, bool kTall>
__device__ __forceinline__ void feed_weights(const TilesJob& job, Shared<kCoding>& shared) {
  using S = Slot<kCoding>;
  const int lane = threadIdx.x;
  const int groups = ceil_div(job.w.blocks(), kBlocks);
  const int first_tile = kTall ? 0 : job.tile_counts[0];
  const int items = job.tile_counts[kTall ? 0 : 1] * groups;
  const int slots = job.w.chunks_of_k() * S::kPerChunk;
  const int64_t block_bytes = int64_t{slots} * S::kBytes;
  const uint64_t policy = streaming_policy();
  RingPlace ring, drawn;
  ring.parity = drawn.parity = 1;
  while (true) {
    int at = 0;
    if (lane == 0) at = atomicAdd(job.next_items + (kTall ? 0 : 1), 1);
    at = __shfl_sync(kFullMask, at, 0);
    const bool more = at < items;
    Item item{0, 0, 0, -1};
    if (more) {
      const int4 tile = job.tiles[first_tile + at / groups];
      item = {tile.x, tile.y, tile.z, at % groups * kBlocks};
    }
    barrier_wait(shared_address(&shared.item_free[drawn.slot]), drawn.parity);
    if (lane == 0) {
      shared.items[drawn.slot] = item;
      barrier_arrive(shared_address(&shared.item_full[drawn.slot]));
    }
    drawn.next(kItems);
    if (!more) return;
    const int block = min(item.block + lane, job.w.blocks() - 1);
    const uint8_t* from =
        job.w.chunks + (int64_t{item.expert} * job.w.blocks() + block) * block_bytes;
    for (int s = 0; s < slots; ++s, from += S::kBytes) {
      const uint32_t full = shared_address(&shared.weights_full[ring.slot]);
      barrier_wait(shared_address(&shared.weights_free[ring.slot]), ring.parity);
      if (lane == 0) barrier_expect(full, kBlocks * S::kBytes);
      __syncwarp();
      if (lane < kBlocks) {
        bulk_copy(shared_address(shared.weights[ring.slot]) + lane * S::kBytes, from, S::kBytes,
                  full, policy);
      }
      ring.next(kSlots);
    }
  }
}

__device__ __forceinline__ void copiers_sync() {
  asm volatile("bar.sync 3, %0;" ::"n"(kCopyThreads) : "memory");
}

/// Warps 1 to 3: copy rows of x. A stage is handed over kCopyLag stages after its request.
template <Coding kCoding>
__device__ __forceinline__ void feed_x(const TilesJob& job, Shared<kCoding>& shared) {
  constexpr int kRowsAtOnce = kCopyThreads / 8;
  const int thread = threadIdx.x - kWarp, chunk = thread % 8;
  const int width = job.w.padded_k();
  RingPlace ring, done, drawn;
  ring.parity = 1;
  int pending = 0;
  auto hand_over = [&] {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    barrier_arrive(shared_address(&shared.x_full[done.slot]));
    done.next(kStages);
    --pending;
  };
  while (true) {
    const Item item = take_item(shared, drawn);
    if (item.block < 0) break;
    copiers_sync();
    for (int r = thread; r < item.count; r += kCopyThreads) {
      shared.sources[r] = source_row(job, item.first + r);
    }
    copiers_sync();
    const __half* x = job.x + chunk * 8;
#pragma unroll 1
    for (int k = 0; k < width; k += kStageK) {
      barrier_wait(shared_address(&shared.x_free[ring.slot]), ring.parity);
      uint8_t* stage = shared.x[ring.slot];
#pragma unroll 4
      for (int r = thread / 8; r < item.count; r += kRowsAtOnce) {
        copy_async(stage + r * 128 + ((chunk ^ (r & 7)) << 4),
                   x + int64_t{shared.sources[r]} * width + k, true);
      }
      copy_commit();
      ring.next(kStages);
      if (++pending > kCopyLag) {
        copy_wait<kCopyLag>();
        hand_over();
      }
    }
  }
  copy_wait<0>();
  while (pending > 0) hand_over();
}

/// Registers of a multiplying warp: two column blocks, each m16 of its warpgroup's two m64.
template <Coding kCoding, bool kExact>
struct Weights {
  LaneTile<kCoding, kExact> tile[2];
  LaneCode<kExact> code[2];
  uint32_t pairs[2];  // local scales of two tiles
  GroupScale scale[2];

  /// Tile `kTile` of the slot's bytes.
  template <int kTile>
  __device__ __forceinline__ void load(const uint8_t* slot, int warp) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      const uint8_t* at = slot + (4 * m + warp) * Slot<kCoding>::kBytes;
      if constexpr (kCoding == Coding::kCcq && kTile % 2 == 0) {
        pairs[m] = *reinterpret_cast<const uint32_t*>(at + lane / 4 * 8 + kTile / 2 * 4);
      }
      const uint4* v =
          reinterpret_cast<const uint4*>(at + scale_bytes(kCoding) + kTile * tile_size(kCoding));
#pragma unroll
      for (int i = 0; i < lane_vectors(kCoding); ++i) tile[m].v[i] = v[i * kWarp + lane];
    }
  }

  template <int kTile, int kPart, int kStep>
  __device__ __forceinline__ void decode(const Registers& held, uint32_t (&a)[2][4]) {
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      if constexpr (kCoding == Coding::kCcq && kPart % 2 == 0 && kStep == 0) {
        scale[m] = GroupScale::of<kTile % 2 * 2 + kPart / 2>(pairs[m], held);
      }
      tile[m].template decode<kPart, kStep>(code[m], scale[m], held, a[m]);
    }
  }
};

/// Adds a k-step to the sums of both m64.
template <int kN>
__device__ __forceinline__ void add_step(float (&sums)[2][kN / 2], const uint32_t (&a)[2][4],
                                         uint64_t x) {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
  for (int m = 0; m < 2; ++m) Wgmma<kN>::add(sums[m], a[m], x);
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

/// Waits until at most kPending steps are unfinished.
template <int kPending>
__device__ __forceinline__ void wait_steps() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

/// Descriptor of a stage: K-major rows of 128 bytes, 128-byte swizzle, 8 rows every 1024 bytes.
__device__ __forceinline__ uint64_t stage_descriptor(const uint8_t* stage) {
  return static_cast<uint64_t>((shared_address(stage) & 0x3ffff) >> 4) | uint64_t{1} << 16 |
         uint64_t{64} << 32 | uint64_t{1} << 62;
}

/// A multiplying warp's way through the rings.
template <Coding kCoding, bool kExact>
struct Multiplier {
  Shared<kCoding>& shared;
  Registers held;
  int group, warp, lane;  // warpgroup 0 or 1, warp in it
  RingPlace x, weights, drawn;
  int used = 0;  // oldest stage of x still held
  Weights<kCoding, kExact> w;
  uint64_t stage;  // descriptor of the stage in use

  __device__ Multiplier(Shared<kCoding>& memory, uint32_t zero)
      : shared(memory),
        held(zero),
        group(threadIdx.x / 128 - 1),
        warp(threadIdx.x / kWarp % 4),
        lane(threadIdx.x % kWarp) {}

  __device__ __forceinline__ const uint8_t* slot_bytes() const {
    return shared.weights[weights.slot] + group * 8 * Slot<kCoding>::kBytes;
  }

  __device__ __forceinline__ void wait_weights() {
    barrier_wait(shared_address(&shared.weights_full[weights.slot]), weights.parity);
  }

  __device__ __forceinline__ void free_weights() {
    __syncwarp();
    if (lane == 0) barrier_arrive(shared_address(&shared.weights_free[weights.slot]));
    weights.next(kSlots);
  }

  __device__ __forceinline__ void wait_x() {
    barrier_wait(shared_address(&shared.x_full[x.slot]), x.parity);
    stage = stage_descriptor(shared.x[x.slot]);
    x.next(kStages);
  }

  /// Lets go of the oldest stage, whose parts are finished.
  __device__ __forceinline__ void free_x() {
    if (lane == 0) barrier_arrive(shared_address(&shared.x_free[used]));
    used = used + 1 == kStages ? 0 : used + 1;
  }

  /// Step `kStep` of part `kPart`, whose operands are in a[kStep]; then decodes the next one, of
  /// the same tile, into those of the step before, which is finished by then.
  template <int kN, int kTile, int kPart, int kStep>
  __device__ __forceinline__ void step(float (&sums)[2][kN / 2], uint32_t (&a)[2][2][4]) {
    add_step<kN>(sums, a[kStep], stage + 4 * (kPart % 2) + 2 * kStep);
    wait_steps<1>();
    if constexpr (kPart == 2 && kStep == 0) free_x();
    if constexpr (kPart < 3 || kStep == 0) {
      w.template decode<kTile, kPart + kStep, 1 - kStep>(held, a[1 - kStep]);
    }
  }

  /// Tile `kTile` of a slot, whose first step is decoded in a[0]; leaves there the next tile's.
  template <int kN, int kTile>
  __device__ __forceinline__ void add_tile(float (&sums)[2][kN / 2], uint32_t (&a)[2][2][4],
                                           bool first, bool more) {
    constexpr int kNext = (kTile + 1) % Slot<kCoding>::kTiles;
    wait_x();
    add_step<kN>(sums, a[0], stage);
    wait_steps<1>();
    if (!first) free_x();
    w.template decode<kTile, 0, 1>(held, a[1]);
    step<kN, kTile, 0, 1>(sums, a);
    step<kN, kTile, 1, 0>(sums, a);
    step<kN, kTile, 1, 1>(sums, a);
    wait_x();
    step<kN, kTile, 2, 0>(sums, a);
    step<kN, kTile, 2, 1>(sums, a);
    step<kN, kTile, 3, 0>(sums, a);
    if constexpr (kNext == 0) {
      free_weights();
      if (more) {
        wait_weights();
        w.template load<0>(slot_bytes(), warp);
      }
    } else {
      w.template load<kNext>(slot_bytes(), warp);
    }
    step<kN, kTile, 3, 1>(sums, a);
    w.template decode<kNext, 0, 0>(held, a[0]);  // of old words after the last tile: not used
  }

  template <int kN>
  __device__ __forceinline__ void add_slots(float (&sums)[2][kN / 2], int slots) {
    uint32_t a[2][2][4];
    wait_weights();
    w.template load<0>(slot_bytes(), warp);
    w.template decode<0, 0, 0>(held, a[0]);
#pragma unroll 1
    for (int s = 1; s <= slots; ++s) {
      add_tile<kN, 0>(sums, a, s == 1, s < slots);
      if constexpr (Slot<kCoding>::kTiles > 1) add_tile<kN, 1>(sums, a, false, s < slots);
      if constexpr (Slot<kCoding>::kTiles > 2) add_tile<kN, 2>(sums, a, false, s < slots);
      if constexpr (Slot<kCoding>::kTiles > 3) add_tile<kN, 3>(sums, a, false, s < slots);
    }
    wait_steps<0>();
    free_x();
  }
};

__device__ __forceinline__ void group_sync(int group) {
  asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory");
}

/// Two tokens' values of this lane's column, as bf16, to staging [token][64 columns], where each of
/// the warpgroup's 8 blocks has 8 columns.
__device__ __forceinline__ void stage_pair(uint8_t* staging, uint32_t pair, int tokens, int block,
                                           int lane) {
  const uint32_t row = shared_address(staging) + block * 16 + (tokens + lane % 8) * kStagingStride;
  asm volatile("stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%0], {%1};" ::"r"(row), "r"(pair)
               : "memory");
}

/// From staging to 64 columns of each row of the output.
template <Coding kCoding, bool kExact>
__device__ __forceinline__ void write_rows(const TilesJob& job,
                                           const Multiplier<kCoding, kExact>& at, const Item& item,
                                           const uint8_t* staging, int first_column, int end,
                                           int width) {
  const int thread = threadIdx.x % 128, piece = thread % 8;
  const int column = first_column + piece * 8;
  group_sync(at.group);
  if (column < end) {
    for (int row = thread / 8; row < item.count; row += 16) {
      const int sorted = item.first + row;
      const int target = job.gated ? sorted : job.slot_of_row[sorted];
      *reinterpret_cast<uint4*>(job.out + int64_t{target} * width + column) =
          *reinterpret_cast<const uint4*>(staging + row * kStagingStride + piece * 16);
    }
  }
  group_sync(at.group);
}

/// Column g of the lane's block m, in the weight's vectors.
template <Coding kCoding, bool kExact>
__device__ __forceinline__ int64_t first_column_of(const TilesJob& job,
                                                   const Multiplier<kCoding, kExact>& at,
                                                   const Item& item, int m) {
  const int block = min(item.block + at.group * 8 + 4 * m + at.warp, job.w.blocks() - 1);
  return (int64_t{item.expert} * job.w.blocks() + block) * kBlockColumns + at.lane / 4;
}

/// Values of columns g (kHalf 0) or g + 8 of the lane's blocks to staging; kGated: of swiglu.
template <int kN, int kHalf, bool kGated, Coding kCoding, bool kExact>
__device__ __forceinline__ void stage_item(const TilesJob& job,
                                           const Multiplier<kCoding, kExact>& at, const Item& item,
                                           const float (&sums)[2][kN / 2]) {
  float scale[2][2];
#pragma unroll
  for (int m = 0; m < 2; ++m) {
    const float* of_column = job.w.column_scale + first_column_of(job, at, item, m);
    scale[m][0] = __ldg(of_column);
    scale[m][1] = __ldg(of_column + 8);
  }
#pragma unroll
  for (int j = 0; j < kN / 8; ++j) {
    float inverse[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = min(8 * j + at.lane % 4 * 2 + i, item.count - 1);
      inverse[i] = inverse_scale(__ldg(job.x_scale + source_row(job, item.first + row)));
    }
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      float value[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float own = scaled(sums[m][4 * j + 2 * kHalf + i], scale[m][kHalf], inverse[i]);
        value[i] =
            kGated ? swiglu(own, scaled(sums[m][4 * j + 2 + i], scale[m][1], inverse[i])) : own;
      }
      stage_pair(at.shared.staging[at.group], pack_bf16(value[0], value[1]), 8 * j, 4 * m + at.warp,
                 at.lane);
    }
  }
}

template <Coding kCoding, bool kExact, int kN>
__device__ __forceinline__ void multiply_item(const TilesJob& job, Multiplier<kCoding, kExact>& at,
                                              const Item& item) {
  const int first_block = item.block + at.group * 8;
  if constexpr (kCoding == Coding::kCcq) {
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      at.w.code[m].load(job.w.codes, job.w.exact, first_column_of(job, at, item, m));
    }
  }
  float sums[2][kN / 2];
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) sums[m][i] = 0.0f;
  }
  at.template add_slots<kN>(sums, job.w.chunks_of_k() * Slot<kCoding>::kPerChunk);

  uint8_t* staging = at.shared.staging[at.group];
  const int half = job.w.out_features / 2, first_column = first_block * 8;
  if (job.gated) {
    stage_item<kN, 0, true>(job, at, item, sums);
    write_rows(job, at, item, staging, first_column, half, half);
  } else {
    stage_item<kN, 0, false>(job, at, item, sums);
    write_rows(job, at, item, staging, first_column, half, 2 * half);
    stage_item<kN, 1, false>(job, at, item, sums);
    write_rows(job, at, item, staging, half + first_column, 2 * half, 2 * half);
  }
}

template <Coding kCoding, bool kExact, bool kTall>
__device__ __forceinline__ void multiply_items(const TilesJob& job, Shared<kCoding>& shared) {
  Multiplier<kCoding, kExact> at(shared, static_cast<uint32_t>(job.w.out_features) >> 30);
  while (true) {
    const Item item = take_item(shared, at.drawn);
    if (item.block < 0) return;
    if constexpr (kTall) {
      if (item.count <= 96) {
        multiply_item<kCoding, kExact, 96>(job, at, item);
      } else {
        multiply_item<kCoding, kExact, 128>(job, at, item);
      }
    } else if (item.count <= 16) {
      multiply_item<kCoding, kExact, 16>(job, at, item);
    } else if (item.count <= 32) {
      multiply_item<kCoding, kExact, 32>(job, at, item);
    } else {
      multiply_item<kCoding, kExact, 64>(job, at, item);
    }
  }
}

#endif  // sm_90a

/// kTall: the tiles of more than kShortTile rows, which need registers of their own.
template <Coding kCoding, bool kExact, bool kTall>
__global__ void __launch_bounds__(kThreads, 1) tiles_kernel(const __grid_constant__ TilesJob job) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) uint8_t memory[];
  auto& shared = *reinterpret_cast<Shared<kCoding>*>(memory);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      barrier_init(shared_address(&shared.x_full[i]), kCopyThreads);
      barrier_init(shared_address(&shared.x_free[i]), 8);
    }
    for (int i = 0; i < kSlots; ++i) {
      barrier_init(shared_address(&shared.weights_full[i]), 1);
      barrier_init(shared_address(&shared.weights_free[i]), 8);
    }
    for (int i = 0; i < kItems; ++i) {
      barrier_init(shared_address(&shared.item_full[i]), 1);
      barrier_init(shared_address(&shared.item_free[i]), 3 + 8);
    }
    barrier_publish();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kFeedRegisters));
    if (threadIdx.x < kWarp) {
      feed_weights<kCoding, kTall>(job, shared);
    } else {
      feed_x<kCoding>(job, shared);
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kMultiplyRegisters));
    multiply_items<kCoding, kExact, kTall>(job, shared);
  }
#endif
}

}  // namespace tiles

template <Coding kCoding, bool kExact, bool kTall>
void launch_tiles_wgmma(const TilesJob& job, int multiprocessors, cudaStream_t stream) {
  auto kernel = tiles::tiles_kernel<kCoding, kExact, kTall>;
  constexpr int kBytes = sizeof(tiles::Shared<kCoding>);
  static const cudaError_t raised = cudaFuncSetAttribute(
      reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  check(raised, "tiles_wgmma: shared memory");
  kernel<<<multiprocessors, tiles::kThreads, kBytes, stream>>>(job);
  check_launch("tiles_wgmma");
}

}  // namespace fd::cuda

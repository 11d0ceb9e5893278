// Sorted rows on compute capability 9.0: decoded weights as register operands of wgmma.
//
// A persistent block takes items: a run of column blocks of one tile of rows. Warpgroup 0 feeds: a
// warp draws items, one has weights copied in bulk and one rows of x, which convert_rows() left as
// wgmma reads them from shared memory. (Three warps with cp.async could not keep up: those that
// multiply tall tiles waited for x half of their time.) The other warpgroups multiply: while the
// tensor cores work on 32 rows of K of 64 columns, the next are decoded.
#pragma once

#include "../ptx/wgmma.cuh"
#include "tiles_items.cuh"

namespace fd::cuda {

namespace tiles {

/// Up to 16 rows: decoding is what takes time, so many warps, with two blocks each, which share
/// what a step costs beside it. 2 KB copies: pieces of 1 KB, more finely spread, took a fifth
/// longer.
struct Low {
  static constexpr bool kTall = false;
  static constexpr int kGroups = 4;  // warpgroups that multiply
  static constexpr int kFeedRegisters = 32;
  static constexpr int kMultiplyRegisters = 112;
  static constexpr int kRows = kMostLowRows;
  static constexpr int kWarpBlocks = 2;
  static constexpr int kStageK = 2 * kTiledK;  // rows of K in a stage of x
  static constexpr int kStages = 4;
  static constexpr int kSlots = 3;  // of weights
  static constexpr bool kBlockFirst = false;
};

/// Up to 40 rows: as before, but the sums leave registers for one block's words at a time.
struct Short {
  static constexpr bool kTall = false;
  static constexpr int kGroups = 4;
  static constexpr int kFeedRegisters = 32;
  static constexpr int kMultiplyRegisters = 112;
  static constexpr int kRows = kMostShortRows;
  static constexpr int kWarpBlocks = 2;
  static constexpr int kStageK = 2 * kTiledK;
  static constexpr int kStages = 4;
  static constexpr int kSlots = 2;
  static constexpr bool kBlockFirst = true;
};

/// Up to 144 rows: the tensor cores are what takes time.
struct Tall {
  static constexpr bool kTall = true;
  static constexpr int kGroups = 3;
  static constexpr int kFeedRegisters = 40;
  static constexpr int kMultiplyRegisters = 152;
  static constexpr int kRows = kMostTallRows;
  static constexpr int kWarpBlocks = 1;
  static constexpr int kStageK = kTiledK;
  static constexpr int kStages = 6;
  static constexpr int kSlots = 2;
  static constexpr bool kBlockFirst = true;
};

template <typename Kind>
constexpr int kWarps = Kind::kGroups * 4;  // that multiply
template <typename Kind>
constexpr int kThreads = (1 + Kind::kGroups) * 128;
template <typename Kind>
constexpr int kBlocks = kWarps<Kind> * Kind::kWarpBlocks;  // column blocks of an item
template <typename Kind>
constexpr int kPieceBytes = Kind::kRows * kTiledK * 2;  // of x, for 64 rows of K: one swizzle
template <typename Kind>
constexpr int kStagingStride = Kind::kWarpBlocks * 64 + 16;  // bytes; shifts by one bank group

/// A block starts with the same registers for each thread, in eights: warpgroups that ask for more
/// in total than that wait for ever.
template <typename Kind>
constexpr bool kRegistersSuffice =
    Kind::kFeedRegisters + Kind::kGroups * Kind::kMultiplyRegisters <=
    65536 / kThreads<Kind> / 8 * 8 * (1 + Kind::kGroups);

template <Coding kCoding, typename Kind>
struct Shared {
  alignas(1024) uint8_t x[Kind::kStages][Kind::kStageK / kTiledK * kPieceBytes<Kind>];
  alignas(128) uint8_t weights[Kind::kSlots][kBlocks<Kind> * Slot<kCoding>::kBytes];
  alignas(16) uint8_t staging[Kind::kGroups][Kind::kRows * kStagingStride<Kind>];
  ItemRing<Kind::kRows> items;
  uint64_t x_full[Kind::kStages], x_free[Kind::kStages];
  uint64_t weights_full[Kind::kSlots], weights_free[Kind::kSlots];
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/// Keeps the ring of weights full.
template <Coding kCoding, typename Kind>
__device__ __forceinline__ void feed_weights(const TilesJob& job, Shared<kCoding, Kind>& shared) {
  using S = Slot<kCoding>;
  const int lane = threadIdx.x % kWarp;
  const int slots = job.w.chunks_of_k() * S::kPerChunk;
  const uint64_t policy = streaming_policy();
  RingPlace ring, drawn;
  ring.parity = 1;
  while (true) {
    const Item item = shared.items.take(drawn);
    if (item.block < 0) return;
    shared.items.release(drawn, job.arrivals);
    const uint8_t* from =
        block_bytes(job.w, item.expert, item.block + lane, int64_t{slots} * S::kBytes);
    for (int s = 0; s < slots; ++s, from += S::kBytes) {
      const uint32_t full = shared_address(&shared.weights_full[ring.slot]);
      barrier_wait(shared_address(&shared.weights_free[ring.slot]), ring.parity);
      if (lane == 0) barrier_expect(full, kBlocks<Kind> * S::kBytes);
      __syncwarp();
      if (lane < kBlocks<Kind>) {
        bulk_copy(shared_address(shared.weights[ring.slot]) + lane * S::kBytes, from, S::kBytes,
                  full, policy);
      }
      ring.next(Kind::kSlots);
    }
  }
}

/// Keeps the ring of x full: 64 rows of K of a tile are one piece (tiled_byte).
template <Coding kCoding, typename Kind>
__device__ __forceinline__ void feed_x(const TilesJob& job, Shared<kCoding, Kind>& shared) {
  constexpr int kPieces = Kind::kStageK / kTiledK;
  const int width = job.w.padded_k(), lane = threadIdx.x % kWarp;
  const uint64_t policy = keeping_policy();
  RingPlace ring, drawn;
  ring.parity = 1;
  while (true) {
    const Item item = shared.items.take(drawn);
    if (item.block < 0) return;
    shared.items.release(drawn, job.arrivals);
    const int bytes = item.count * kTiledK * 2;
    const uint8_t* from =
        reinterpret_cast<const uint8_t*>(job.x + int64_t{item.first} * width) + lane * bytes;
    for (int k = 0; k < width; k += Kind::kStageK, from += kPieces * bytes) {
      const uint32_t full = shared_address(&shared.x_full[ring.slot]);
      barrier_wait(shared_address(&shared.x_free[ring.slot]), ring.parity);
      if (lane == 0) barrier_expect(full, kPieces * bytes);
      __syncwarp();
      if (lane < kPieces) {
        bulk_copy(shared_address(shared.x[ring.slot]) + lane * kPieceBytes<Kind>, from, bytes, full,
                  policy);
      }
      ring.next(Kind::kStages);
    }
  }
}

/// A multiplying warp's weights: a column block, an m16 of each of its warpgroup's m64.
template <Coding kCoding, bool kExact, int kWarpBlocks>
struct Weights {
  LaneTile<kCoding, kExact> tile[kWarpBlocks];
  LaneCode<kExact> code[kWarpBlocks];
  uint32_t pairs[kWarpBlocks];  // local scales of two tiles
  GroupScale scale[kWarpBlocks];

  /// Tile `kTile` of blocks kFrom .. kTo - 1; `at`: the blocks' bytes in a slot.
  template <int kTile, int kFrom, int kTo>
  __device__ __forceinline__ void load(const uint8_t* at) {
    const int lane = threadIdx.x % kWarp;
    at += kFrom * 4 * Slot<kCoding>::kBytes;
#pragma unroll
    for (int m = kFrom; m < kTo; ++m, at += 4 * Slot<kCoding>::kBytes) {
      if constexpr (kCoding == Coding::kCcq && kTile % 2 == 0) {
        pairs[m] = *reinterpret_cast<const uint32_t*>(at + lane / 4 * 8 + kTile / 2 * 4);
      }
      const uint4* v =
          reinterpret_cast<const uint4*>(at + scale_bytes(kCoding) + kTile * tile_size(kCoding));
#pragma unroll
      for (int i = 0; i < lane_vectors(kCoding); ++i) tile[m].v[i] = v[i * kWarp + lane];
    }
  }

  /// Operands of both steps of part `kPart` of block `m`.
  template <int kTile, int kPart, int m>
  __device__ __forceinline__ void decode(const Registers& held, uint32_t (&a)[2][4]) {
    if constexpr (kCoding == Coding::kCcq && kPart % 2 == 0) {
      scale[m] = GroupScale::of<kTile % 2 * 2 + kPart / 2>(pairs[m], held);
    }
    tile[m].template decode<kPart, 0>(code[m], scale[m], held, a[0]);
    tile[m].template decode<kPart, 1>(code[m], scale[m], held, a[1]);
  }
};

/// Adds 32 rows of K to the sums of an m64.
template <int kN>
__device__ __forceinline__ void add_part(float (&sums)[kN / 2], const uint32_t (&a)[2][4],
                                         uint64_t x) {
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < 2; ++step) Wgmma<kN>::add(sums, a[step], x + 2 * step);
  wgmma_commit();
}

/// Descriptor of a stage: K-major rows of 128 bytes, 128-byte swizzle, 8 rows every 1024 bytes.
__device__ __forceinline__ uint64_t stage_descriptor(const uint8_t* stage) {
  return static_cast<uint64_t>((shared_address(stage) & 0x3ffff) >> 4) | uint64_t{1} << 16 |
         uint64_t{64} << 32 | uint64_t{1} << 62;
}

/// A multiplying warp's way through the rings.
template <Coding kCoding, typename Kind>
struct Multiplier {
  static constexpr int kWarpBlocks = Kind::kWarpBlocks;
  Shared<kCoding, Kind>& shared;
  Registers held;
  int arrivals;           // of a warp: see warp_arrive()
  int group, warp, lane;  // warpgroup of those that multiply, warp in it
  RingPlace x, weights, drawn;
  uint64_t stage;  // descriptor of the stage in use

  __device__ Multiplier(Shared<kCoding, Kind>& memory, const TilesJob& job)
      : shared(memory),
        held(static_cast<uint32_t>(job.w.out_features) >> 30),
        arrivals(job.arrivals),
        group(threadIdx.x / 128 - 1),
        warp(threadIdx.x / kWarp % 4),
        lane(threadIdx.x % kWarp) {}

  /// The warp's first block; its warpgroup's next m64 is four blocks on.
  __device__ __forceinline__ int first_block() const { return group * 4 * kWarpBlocks + warp; }

  __device__ __forceinline__ const uint8_t* slot_bytes() const {
    return shared.weights[weights.slot] + first_block() * Slot<kCoding>::kBytes;
  }

  __device__ __forceinline__ void wait_weights() {
    barrier_wait(shared_address(&shared.weights_full[weights.slot]), weights.parity);
  }

  __device__ __forceinline__ void free_weights() {
    warp_arrive(shared_address(&shared.weights_free[weights.slot]), arrivals);
    weights.next(Kind::kSlots);
  }

  __device__ __forceinline__ void wait_x() {
    barrier_wait(shared_address(&shared.x_full[x.slot]), x.parity);
    stage = stage_descriptor(shared.x[x.slot]);
    x.next(Kind::kStages);
  }

  /// Lets go of the stage `kBack` before the one in use, whose parts are finished.
  template <int kBack>
  __device__ __forceinline__ void free_x() {
    const int at = x.slot - 1 - kBack;
    if (lane == 0) barrier_arrive(shared_address(&shared.x_free[at < 0 ? at + Kind::kStages : at]));
  }

  static constexpr int kSteps = 4 * kWarpBlocks;  // of a tile: a part of a block each
  static constexpr int part_of(int step) {
    return Kind::kBlockFirst ? step % 4 : step / kWarpBlocks;
  }
  static constexpr int block_of(int step) {
    return Kind::kBlockFirst ? step / 4 : step % kWarpBlocks;
  }

  /// The words that step `kStep` of tile `kTile` is the first to need.
  template <int kTile, int kStep, bool kExact>
  __device__ __forceinline__ void load_for(Weights<kCoding, kExact, kWarpBlocks>& w) {
    if constexpr (Kind::kBlockFirst && kStep % 4 == 0) {
      w.template load<kTile, kStep / 4, kStep / 4 + 1>(slot_bytes());
    } else if constexpr (!Kind::kBlockFirst && kStep == 0) {
      w.template load<kTile, 0, kWarpBlocks>(slot_bytes());
    }
  }

  /// Step `kStep` of tile `kTile` of a slot, decoded in a[its parity]; leaves the next one in the
  /// other, whose own product is finished by then.
  template <int kN, int kTile, int kStep, bool kExact>
  __device__ __forceinline__ void add_next(float (&sums)[kWarpBlocks][kN / 2],
                                           uint32_t (&a)[2][2][4],
                                           Weights<kCoding, kExact, kWarpBlocks>& w, bool first,
                                           bool more) {
    constexpr int kPart = part_of(kStep), m = block_of(kStep), kRow = kPart * 32;
    constexpr bool kLast = kStep == kSteps - 1;
    constexpr int kNext = (kStep + 1) % kSteps;
    constexpr int kNextTile = kLast ? (kTile + 1) % Slot<kCoding>::kTiles : kTile;
    constexpr int kInStage = kRow % Kind::kStageK;
    static_assert(!Kind::kBlockFirst || kWarpBlocks == 1 || Kind::kStageK == 4 * 32);
    if constexpr (kInStage == 0 && m == 0) wait_x();
    add_part<kN>(sums[m], a[kStep % 2],
                 stage + kInStage / kTiledK * (kPieceBytes<Kind> / 16) + kInStage % kTiledK / 8);
    wgmma_wait<1>();
    if constexpr (kInStage == 0 && m == 0) {
      if (kPart > 0 || !first) free_x<1>();
    }
    if constexpr (kLast && kNextTile == 0) {
      free_weights();
      if (more) {
        wait_weights();
        load_for<0, 0>(w);
      }
    } else {
      load_for<kNextTile, kNext>(w);
    }
    // after the last tile: of old words
    w.template decode<kNextTile, part_of(kNext), block_of(kNext)>(held, a[kNext % 2]);
    if constexpr (!kLast) add_next<kN, kTile, kNext, kExact>(sums, a, w, first, more);
  }

  template <int kN, bool kExact>
  __device__ __forceinline__ void add_slots(float (&sums)[kWarpBlocks][kN / 2],
                                            Weights<kCoding, kExact, kWarpBlocks>& w, int slots) {
    uint32_t a[2][2][4];
    wait_weights();
    load_for<0, 0>(w);
    w.template decode<0, 0, 0>(held, a[0]);
#pragma unroll 1
    for (int s = 1; s <= slots; ++s) {
      const bool more = s < slots;
      add_next<kN, 0, 0>(sums, a, w, s == 1, more);
      if constexpr (Slot<kCoding>::kTiles > 1) add_next<kN, 1, 0>(sums, a, w, false, more);
      if constexpr (Slot<kCoding>::kTiles > 2) add_next<kN, 2, 0>(sums, a, w, false, more);
      if constexpr (Slot<kCoding>::kTiles > 3) add_next<kN, 3, 0>(sums, a, w, false, more);
    }
    wgmma_wait<0>();
    free_x<0>();
  }
};

/// Barrier of a warpgroup that multiplies; 0 is the block's.
__device__ __forceinline__ int barrier_of(int group) { return group + 1; }

/// Two tokens' values of this lane's column, as bf16, to staging: rows of tokens, 8 columns for
/// each of the warpgroup's blocks.
template <int kStride>
__device__ __forceinline__ void stage_pair(uint8_t* staging, uint32_t pair, int tokens, int block,
                                           int lane) {
  const uint32_t row = shared_address(staging) + block * 16 + (tokens + lane % 8) * kStride;
  store_transposed(row, pair);
}

/// From staging to the warpgroup's columns of each row of the output.
template <Coding kCoding, typename Kind>
__device__ __forceinline__ void write_rows(const TilesJob& job, const Multiplier<kCoding, Kind>& at,
                                           const Item& item, const uint8_t* staging,
                                           int first_column, int end, int width) {
  constexpr int kPieces = 4 * Kind::kWarpBlocks;  // of 8 columns
  const int thread = threadIdx.x % 128, piece = thread % kPieces;
  const int column = first_column + piece * 8;
  warpgroup_sync(barrier_of(at.group));
  if (column < end) {
    for (int row = thread / kPieces; row < item.count; row += 128 / kPieces) {
      const int sorted = item.first + row;
      const int target = job.gated ? sorted : job.slot_of_row[sorted];
      *reinterpret_cast<uint4*>(job.out + int64_t{target} * width + column) =
          *reinterpret_cast<const uint4*>(staging + row * kStagingStride<Kind> + piece * 16);
    }
  }
  warpgroup_sync(barrier_of(at.group));
}

/// Column g of the warp's block `m`, in the weight's vectors.
template <Coding kCoding, typename Kind>
__device__ __forceinline__ int64_t column_of(const TilesJob& job,
                                             const Multiplier<kCoding, Kind>& at, const Item& item,
                                             int m) {
  const int block = min(item.block + at.first_block() + 4 * m, job.w.blocks() - 1);
  return (int64_t{item.expert} * job.w.blocks() + block) * kBlockColumns + at.lane / 4;
}

/// Values of columns g (kHalf 0) or g + 8 of the warp's blocks to staging; kGated: of swiglu.
template <int kN, int kHalf, bool kGated, Coding kCoding, typename Kind>
__device__ __forceinline__ void stage_item(const TilesJob& job, const Multiplier<kCoding, Kind>& at,
                                           const Item& item,
                                           const float (&sums)[Kind::kWarpBlocks][kN / 2]) {
  const float* inverses = at.shared.items.inverse[at.drawn.slot] + at.lane % 4 * 2;
#pragma unroll
  for (int m = 0; m < Kind::kWarpBlocks; ++m) {
    const float* of_column = job.w.column_scale + column_of(job, at, item, m);
    const float scale[2] = {__ldg(of_column), __ldg(of_column + 8)};
#pragma unroll
    for (int j = 0; j < kN / 8; ++j) {
      float value[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float inverse = inverses[8 * j + i];  // past the rows: anything
        const float own = scaled(sums[m][4 * j + 2 * kHalf + i], scale[kHalf], inverse);
        value[i] = kGated ? swiglu(own, scaled(sums[m][4 * j + 2 + i], scale[1], inverse)) : own;
      }
      stage_pair<kStagingStride<Kind>>(at.shared.staging[at.group], pack_bf16(value[0], value[1]),
                                       8 * j, 4 * m + at.warp, at.lane);
    }
  }
}

template <bool kExact, int kN, Coding kCoding, typename Kind>
__device__ __forceinline__ void multiply_item(const TilesJob& job, Multiplier<kCoding, Kind>& at,
                                              const Item& item) {
  Weights<kCoding, kExact, Kind::kWarpBlocks> w;
  float sums[Kind::kWarpBlocks][kN / 2];
#pragma unroll
  for (int m = 0; m < Kind::kWarpBlocks; ++m) {
    if constexpr (kCoding == Coding::kCcq) {
      w.code[m].load(job.w.codes, job.w.exact, column_of(job, at, item, m));
    }
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) sums[m][i] = 0.0f;
  }
  at.template add_slots<kN>(sums, w, job.w.chunks_of_k() * Slot<kCoding>::kPerChunk);

  uint8_t* staging = at.shared.staging[at.group];
  const int half = job.w.out_features / 2;
  const int first_column = (item.block + at.group * 4 * Kind::kWarpBlocks) * 8;
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

/// The least of the heights that holds the item's rows.
template <int kN, int... kHigher, Coding kCoding, typename Kind>
__device__ __forceinline__ void multiply_height(const TilesJob& job, Multiplier<kCoding, Kind>& at,
                                                const Item& item) {
  if constexpr (sizeof...(kHigher) == 0) {
    multiply_item<false, kN>(job, at, item);
  } else if (item.count <= kN) {
    multiply_item<false, kN>(job, at, item);
  } else {
    multiply_height<kHigher...>(job, at, item);
  }
}

template <Coding kCoding, typename Kind>
__device__ __forceinline__ void multiply_items(const TilesJob& job, Shared<kCoding, Kind>& shared) {
  Multiplier<kCoding, Kind> at(shared, job);
  while (true) {
    const Item& item = shared.items.take(at.drawn);
    if (item.block < 0) return;
    bool proven = true;  // of the warpgroup's columns, so that its warps take one way
    if constexpr (kCoding == Coding::kCcq) {
      if (!job.w.proven) {
        for (int m = 0; m < Kind::kWarpBlocks; ++m) {
          proven = columns_proven<kCoding>(job.w, column_of(job, at, item, m)) && proven;
        }
        proven = warpgroup_and(barrier_of(at.group), proven);
      }
    }
    if (kCoding == Coding::kCcq && !proven) {  // rare: one height is enough
      multiply_item<kCoding == Coding::kCcq, Kind::kRows>(job, at, item);
    } else if constexpr (Kind::kTall) {
      // each instance costs registers: more of them and products would be serialised
      multiply_height<64, 96, 128, 144>(job, at, item);
    } else if constexpr (Kind::kRows == kMostLowRows) {
      multiply_height<8, 16>(job, at, item);
    } else {
      multiply_height<8, 16, 24, 32, 40>(job, at, item);
    }
    shared.items.release(at.drawn, job.arrivals);
  }
}

#endif  // sm_90a

template <Coding kCoding, typename Kind>
__global__ void __launch_bounds__(kThreads<Kind>, 1)
    tiles_kernel(const __grid_constant__ TilesJob job) {
  static_assert(kRegistersSuffice<Kind>);
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) uint8_t memory[];
  auto& shared = *reinterpret_cast<Shared<kCoding, Kind>*>(memory);
  if (threadIdx.x == 0) {
    for (int i = 0; i < Kind::kStages; ++i) {
      barrier_init(shared_address(&shared.x_full[i]), 1);
      barrier_init(shared_address(&shared.x_free[i]), kWarps<Kind>);
    }
    for (int i = 0; i < Kind::kSlots; ++i) {
      barrier_init(shared_address(&shared.weights_full[i]), 1);
      barrier_init(shared_address(&shared.weights_free[i]), kWarps<Kind> * job.arrivals);
    }
    shared.items.init(2 + kWarps<Kind>, job.arrivals);
    barrier_publish();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    give_registers<Kind::kFeedRegisters>();
    const int warp = threadIdx.x / kWarp;
    if (warp == 0) feed_weights(job, shared);
    if (warp == 1) feed_x(job, shared);
    if (warp == 2) draw_items<kCoding, Kind::kTall, kBlocks<Kind>>(job, shared.items);
  } else {
    take_registers<Kind::kMultiplyRegisters>();
    multiply_items(job, shared);
  }
#endif
}

}  // namespace tiles

template <Coding kCoding, typename Kind>
void launch_tiles_wgmma(const TilesJob& job, int multiprocessors, cudaStream_t stream) {
  auto kernel = tiles::tiles_kernel<kCoding, Kind>;
  constexpr int kBytes = sizeof(tiles::Shared<kCoding, Kind>);
  static_assert(kBytes <= 227 * 1024);
  static const cudaError_t raised = cudaFuncSetAttribute(
      reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  check(raised, "tiles_wgmma: shared memory");
  kernel<<<multiprocessors, tiles::kThreads<Kind>, kBytes, stream>>>(job);
  check_launch("tiles_wgmma");
}

}  // namespace fd::cuda

// Many rows on compute capability 9.0: decoded weights as register operands of wgmma.
//
// A persistent block takes items, 128 columns of a tile of up to 160 rows. One warp feeds: bulk
// copies bring a k tile of the weights and of x, which order_rows() left as wgmma reads it from
// shared memory. (Two blocks that fetch halves of x for both, by multicast, took 1.6 times as
// long; three warpgroups with 96 rows 1.15 times, as decoding then serves fewer rows.) Two
// warpgroups multiply, 64 columns each: while the tensor cores work on 32 rows of K, the next are
// decoded; while one adds up a part of K, the other's products run. The product is the canonical
// one of gemm_rows.cuh, whose bits do not tell wgmma from mma.sync.
#pragma once

#include "gemm/ring.cuh"
#include "gemm_hopper.h"
#include "gemm_rows.cuh"
#include "ptx/wgmma.cuh"

namespace fd::cuda {

namespace hopper {

constexpr int kGroups = 2;            // warpgroups that multiply
constexpr int kBlocks = 4 * kGroups;  // column blocks of an item
constexpr int kThreads = (1 + kGroups) * 128;
constexpr int kFeedRegisters = 40;
constexpr int kMultiplyRegisters = 232;
static_assert(kFeedRegisters + kGroups * kMultiplyRegisters <= 65536 / kThreads / 8 * 8 * 3);
constexpr int kStages = 3;
constexpr int kPieces = kTileRows / 64;  // of x, 64 rows of K each: one swizzle
constexpr int kPieceBytes = kHopperRows * 128;

template <Kind kKind>
struct Shared {
  alignas(1024) uint8_t x[kStages][kPieces * kPieceBytes];
  alignas(128) uint8_t weights[kStages][kBlocks * tile_bytes(kKind)];
  alignas(128) uint8_t staging[kGroups][kHopperRows * 128];  // rows of 64 columns, swizzled
  uint64_t full[kStages], free[kStages];
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/// An item's place, in an order that lets blocks at work share rows and columns in the L2 cache.
struct Place {
  int tile, group;     // of rows, of columns
  int part, end_part;  // of K
  int k_tile, end_k_tile;

  __device__ Place(int item, const HopperJob& job) {
    constexpr int kTogether = 8;  // tiles of rows
    const int run = item % job.runs, at = item / job.runs;
    const int band = at / (kTogether * job.groups), first = band * kTogether;
    const int here = min(job.tiles - first, kTogether), inside = at - first * job.groups;
    tile = first + inside % here;
    group = inside / here;
    part = job.parts / job.runs * run;
    end_part = part + job.parts / job.runs;
    k_tile = part_begin(job.w, part, job.parts);
    end_k_tile = part_begin(job.w, end_part, job.parts);
  }
};

__device__ __forceinline__ int rows_of(const HopperJob& job, int tile) {
  return min(job.height, job.rows - tile * job.height);
}

/// Keeps the ring full; one warp.
template <Kind kKind>
__device__ __forceinline__ void feed(const HopperJob& job, Shared<kKind>& shared) {
  constexpr int kBytes = static_cast<int>(tile_bytes(kKind));
  const int lane = threadIdx.x % kWarp, k_tiles = job.w.k_tiles;
  const int piece = max(lane - kBlocks, 0);  // of x
  const uint64_t keep = keeping_policy(), stream = streaming_policy();
  RingPlace ring;
  ring.parity = 1;
  for (int item = blockIdx.x; item < job.items(); item += gridDim.x) {
    const Place place(item, job);
    const int bytes = rows_of(job, place.tile) * 128;
    const int block = min(place.group * kBlocks + lane, job.w.n_tiles - 1);
    const uint8_t* weights = reinterpret_cast<const uint8_t*>(job.w.tiles) +
                             (int64_t{block} * k_tiles + place.k_tile) * kBytes;
    const uint8_t* x = job.x + int64_t{place.tile} * job.height * k_tiles * (kTileRows * 2) +
                       (int64_t{kPieces} * place.k_tile + piece) * bytes;
    for (int k = place.k_tile; k < place.end_k_tile; ++k, weights += kBytes, x += kPieces * bytes) {
      const uint32_t full = shared_address(&shared.full[ring.slot]);
      barrier_wait(shared_address(&shared.free[ring.slot]), ring.parity);
      if (lane == 0) barrier_expect(full, kBlocks * kBytes + kPieces * bytes);
      __syncwarp();
      if (lane < kBlocks) {
        bulk_copy(shared_address(shared.weights[ring.slot]) + lane * kBytes, weights, kBytes, full,
                  job.tiles > 1 ? keep : stream);
      } else if (lane < kBlocks + kPieces) {
        bulk_copy(shared_address(shared.x[ring.slot]) + piece * kPieceBytes, x, bytes, full, keep);
      }
      ring.next(kStages);
    }
  }
}

/// Descriptor of a piece of x: K-major rows of 128 bytes, 128-byte swizzle.
__device__ __forceinline__ uint64_t descriptor_of(const uint8_t* piece) {
  return static_cast<uint64_t>((shared_address(piece) & 0x3ffff) >> 4) | uint64_t{1} << 16 |
         uint64_t{64} << 32 | uint64_t{1} << 62;
}

/// A warp that multiplies: its column block, an m16 of the warpgroup's m64, and its way through the
/// ring.
template <Kind kKind, int kN>
struct Multiplier {
  static constexpr int kVectors = tile_vectors(kKind);
  Shared<kKind>& shared;
  int group, warp, lane;
  RingPlace ring;
  uint4 v[kVectors];
  uint32_t a[2][2][4];  // operands of the chunk at work and of the next
  float acc[kN / 2], totals[kN / 2];

  __device__ explicit Multiplier(Shared<kKind>& memory)
      : shared(memory),
        group(threadIdx.x / 128 - 1),
        warp(threadIdx.x / kWarp % 4),
        lane(threadIdx.x % kWarp) {}

  __device__ __forceinline__ void load() {
    barrier_wait(shared_address(&shared.full[ring.slot]), ring.parity);
    const uint32_t at = shared_address(shared.weights[ring.slot]) +
                        (group * 4 + warp) * static_cast<int>(tile_bytes(kKind)) + lane * 16;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) v[i] = load_shared(at + i * 512);
  }

  template <int kChunk>
  __device__ __forceinline__ void decode() {
    const LaneColumns none{};
    decode_fragment<kKind, kChunk, 0>(v, none, a[kChunk % 2][0]);
    decode_fragment<kKind, kChunk, 1>(v, none, a[kChunk % 2][1]);
  }

  /// Chunk `kChunk` of the k tile, 32 rows, while the next is decoded. `more`: a k tile follows.
  template <int kChunk>
  __device__ __forceinline__ void add_chunk(uint64_t x, bool more) {
    constexpr int kNext = (kChunk + 1) % 4;
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      WgmmaBf16<kN>::add(acc, a[kChunk % 2][step],
                         x + kChunk / 2 * (kPieceBytes / 16) + kChunk % 2 * 4 + 2 * step);
    }
    wgmma_commit();
    wgmma_wait<1>();
    if constexpr (kNext == 0) {
      if (!more) return;
      load();
    }
    decode<kNext>();
  }

  __device__ __forceinline__ void free_stage(const HopperJob& job, int slot) const {
    warp_arrive(shared_address(&shared.free[slot]), job.arrivals);
  }

  /// One k tile. Its stage is free once its last chunk is finished, one chunk later.
  __device__ __forceinline__ void add_tile(const HopperJob& job, bool first, bool more) {
    const uint64_t x = descriptor_of(shared.x[ring.slot]);
    const int before = ring.slot == 0 ? kStages - 1 : ring.slot - 1;
    ring.next(kStages);
    add_chunk<0>(x, true);
    if (!first) free_stage(job, before);
    add_chunk<1>(x, true);
    add_chunk<2>(x, true);
    add_chunk<3>(x, more);
  }

  __device__ __forceinline__ void add_up(bool first) {
    wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) {
      asm volatile("" : "+f"(acc[i])::"memory");  // not before the wait
      totals[i] = first ? acc[i] : __fadd_rn(totals[i], acc[i]);
      acc[i] = 0.0f;
    }
  }

  __device__ __forceinline__ void multiply(const HopperJob& job, const Place& place) {
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) acc[i] = 0.0f;
    load();
    decode<0>();
    int k = place.k_tile;
    for (int part = place.part; part < place.end_part; ++part) {
      for (const int end = part_begin(job.w, part + 1, job.parts); k < end; ++k) {
        add_tile(job, k == place.k_tile, k + 1 < place.end_k_tile);
      }
      add_up(part == place.part || job.runs > 1);
      if (job.runs > 1) {
        store_floats(job, place, job.p.partial + int64_t{part} * job.rows * job.p.out_columns);
      }
    }
    free_stage(job, ring.slot == 0 ? kStages - 1 : ring.slot - 1);
  }

  /// The warpgroup's columns in float32: eight columns of a row are 32 bytes.
  __device__ __forceinline__ void store_floats(const HopperJob& job, const Place& place,
                                               float* to) const {
    const int rows = rows_of(job, place.tile);
    const int column = (place.group * kBlocks + group * 4 + warp) * kTileColumns + lane / 4;
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) {
      const int row = i / 4 * 8 + lane % 4 * 2 + i % 2, at = column + i / 2 % 2 * 8;
      if (row >= rows || at >= job.p.out_columns) continue;
      to[(int64_t{place.tile} * job.height + row) * job.p.out_columns + at] = totals[i];
    }
  }

  /// As bf16 through shared memory, so that a row's 64 columns are written together.
  __device__ __forceinline__ void store_rows(const HopperJob& job, const Place& place) const {
    const uint32_t staging = shared_address(shared.staging[group]);
    auto piece = [&](int row, int at) { return staging + row * 128 + ((at ^ (row & 7)) << 4); };
#pragma unroll
    for (int j = 0; j < kN / 8; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int i = 4 * j + 2 * half;
        store_transposed(piece(8 * j + lane % 8, 2 * warp + half),
                         pack_bf16(totals[i], totals[i + 1]));
      }
    }
    warpgroup_sync(group + 1);
    const int thread = threadIdx.x % 128, at = thread % 8;
    const int column = (place.group * kBlocks + group * 4) * kTileColumns + at * 8;
    if (column < job.p.out_columns) {
      const int rows = rows_of(job, place.tile);
      bf16* const out = job.p.out + int64_t{place.tile} * job.height * job.p.out_columns + column;
      for (int row = thread / 8; row < rows; row += 16) {
        *reinterpret_cast<uint4*>(out + int64_t{row} * job.p.out_columns) =
            load_shared(piece(row, at));
      }
    }
    warpgroup_sync(group + 1);
  }

  __device__ __forceinline__ void run(const HopperJob& job) {
    for (int item = blockIdx.x; item < job.items(); item += gridDim.x) {
      const Place place(item, job);
      multiply(job, place);
      if (job.runs > 1) continue;
      const int block = min(place.group * kBlocks + group * 4 + warp, job.w.n_tiles - 1);
      const float* of_column = job.w.column_scale + block * kTileColumns + lane / 4;
      const float scale[2] = {__ldg(of_column), __ldg(of_column + 8)};
#pragma unroll
      for (int i = 0; i < kN / 2; ++i) {
        totals[i] = finished<false>(totals[i], 0.0f, scale[i / 2 % 2], 1.0f);
      }
      if (job.p.out_float != nullptr) {
        store_floats(job, place, job.p.out_float);
      } else {
        store_rows(job, place);
      }
    }
  }
};

#endif  // sm_90a

template <Kind kKind, int kN>
__global__ void __launch_bounds__(kThreads, 1) gemm_kernel(const __grid_constant__ HopperJob job) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) uint8_t memory[];
  auto& shared = *reinterpret_cast<Shared<kKind>*>(memory);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      barrier_init(shared_address(&shared.full[i]), 1);
      barrier_init(shared_address(&shared.free[i]), 4 * kGroups * job.arrivals);
    }
    barrier_publish();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    give_registers<kFeedRegisters>();
    if (threadIdx.x < kWarp) feed(job, shared);
  } else {
    take_registers<kMultiplyRegisters>();
    Multiplier<kKind, kN>(shared).run(job);
  }
#endif
}

template <Kind kKind, int kN>
void launch_height(const HopperJob& job, int multiprocessors, cudaStream_t stream) {
  auto kernel = gemm_kernel<kKind, kN>;
  constexpr int kBytes = sizeof(Shared<kKind>);
  static_assert(kBytes <= 227 * 1024);
  static const cudaError_t raised = cudaFuncSetAttribute(
      reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  check(raised, "gemm_hopper: shared memory");
  const int blocks = job.items() < multiprocessors ? job.items() : multiprocessors;
  kernel<<<blocks, kThreads, kBytes, stream>>>(job);
  check_launch("gemm_hopper");
}

}  // namespace hopper

template <Kind kKind>
void launch_hopper(const HopperJob& job, int multiprocessors, cudaStream_t stream) {
  switch (hopper_kernel_rows(job.height)) {
    case 32:
      return hopper::launch_height<kKind, 32>(job, multiprocessors, stream);
    case 64:
      return hopper::launch_height<kKind, 64>(job, multiprocessors, stream);
    case 96:
      return hopper::launch_height<kKind, 96>(job, multiprocessors, stream);
    case 128:
      return hopper::launch_height<kKind, 128>(job, multiprocessors, stream);
    default:
      return hopper::launch_height<kKind, kHopperRows>(job, multiprocessors, stream);
  }
}

}  // namespace fd::cuda

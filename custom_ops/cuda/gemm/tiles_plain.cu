// Rows sorted by expert, on any card: mma.sync, weights straight into registers. The same sums as
// the other kernels.
#include "jobs.cuh"

namespace fd::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kMaxGroups = 4;  // of 8 tokens that a block multiplies at once

template <int kPart, Coding kCoding, bool kExact, int kGroups>
__device__ __forceinline__ void add_part(LaneTile<kCoding, kExact>& tile,
                                         const LaneCode<kExact>& code, const GroupScale& scale,
                                         const Registers& held, const uint4* const (&x)[kGroups],
                                         int at, float (&sums)[kGroups][4]) {
  uint32_t a[2][4];
  tile.template decode<kPart, 0>(code, scale, held, a[0]);
  tile.template decode<kPart, 1>(code, scale, held, a[1]);
#pragma unroll
  for (int j = 0; j < kGroups; ++j) {
    const uint4 b = __ldg(x[j] + at + kPart * 4);
    mma_f16(sums[j], a[0], b.x, b.y);
    mma_f16(sums[j], a[1], b.z, b.w);
  }
}

/// 512 rows of one block times kGroups groups of 8 tokens. `x`: this lane's rows at the chunk.
template <Coding kCoding, bool kExact, int kGroups>
__device__ __forceinline__ void add_chunk(const uint8_t* chunk, const uint4* const (&x)[kGroups],
                                          int at, const LaneCode<kExact>& code,
                                          const Registers& held, float (&sums)[kGroups][4]) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll 1
  for (int t = 0; t < kChunkTiles; ++t) {
    LaneTile<kCoding, kExact> tile;
    const uint4* v =
        reinterpret_cast<const uint4*>(chunk + scale_bytes(kCoding) + t * tile_size(kCoding));
#pragma unroll
    for (int i = 0; i < lane_vectors(kCoding); ++i) tile.v[i] = load_stream(v + i * kWarp + lane);
    GroupScale scale[2];
    if constexpr (kCoding == Coding::kCcq) {
      const uint32_t pairs =
          __ldg(reinterpret_cast<const uint32_t*>(chunk + lane / 4 * 8 + t / 2 * 4)) >> (t % 2 * 8);
      scale[0] = GroupScale::of<0>(pairs, held);
      scale[1] = GroupScale::of<1>(pairs, held);
    }
    add_part<0>(tile, code, scale[0], held, x, at + t * 16, sums);
    add_part<1>(tile, code, scale[0], held, x, at + t * 16, sums);
    add_part<2>(tile, code, scale[1], held, x, at + t * 16, sums);
    add_part<3>(tile, code, scale[1], held, x, at + t * 16, sums);
  }
}

template <Coding kCoding, bool kExact, int kGroups>
__device__ void multiply(const TilesJob& job, const int4& tile, int first_row, int block) {
  const int lane = threadIdx.x % kWarp, g = lane / 4, c = lane % 4;
  const Registers held(static_cast<uint32_t>(job.w.out_features) >> 30);
  const int64_t weight_block = int64_t{tile.x} * job.w.blocks() + block;
  const int64_t column = weight_block * kBlockColumns + g;
  LaneCode<kExact> code;
  if constexpr (kCoding == Coding::kCcq) code.load(job.w.codes, job.w.exact, column);
  const uint4* x[kGroups];
#pragma unroll
  for (int j = 0; j < kGroups; ++j) {
    const int row = tile.y + min(first_row + 8 * j + g, tile.z - 1);
    x[j] =
        reinterpret_cast<const uint4*>(job.x + int64_t{source_row(job, row)} * job.w.padded_k()) +
        c;
  }
  float sums[kGroups][4] = {};
  const int chunks = job.w.chunks_of_k();
  const uint8_t* from = job.w.chunks + weight_block * chunks * chunk_bytes(kCoding);
  for (int k = 0; k < chunks; ++k, from += chunk_bytes(kCoding)) {
    add_chunk<kCoding, kExact, kGroups>(from, x, k * (kChunkK / 8), code, held, sums);
  }
  const int half = job.w.out_features / 2, n = block * 8 + g;
  const float low = __ldg(job.w.column_scale + column),
              high = __ldg(job.w.column_scale + column + 8);
#pragma unroll
  for (int j = 0; j < kGroups; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = first_row + 8 * j + 2 * c + i;
      if (row >= tile.z) continue;
      const int sorted = tile.y + row;
      const float inverse = inverse_scale(__ldg(job.x_scale + source_row(job, sorted)));
      const float first = scaled(sums[j][i], low, inverse);
      const float second = scaled(sums[j][2 + i], high, inverse);
      if (job.gated) {
        job.out[int64_t{sorted} * half + n] = __float2bfloat16_rn(swiglu(first, second));
      } else {
        const int64_t row_begin = int64_t{job.slot_of_row[sorted]} * (2 * half);
        job.out[row_begin + n] = __float2bfloat16_rn(first);
        job.out[row_begin + half + n] = __float2bfloat16_rn(second);
      }
    }
  }
}

/// Grid: column blocks by kWarps, tiles.
template <Coding kCoding, bool kExact>
__global__ void __launch_bounds__(kWarps* kWarp)
    plain_kernel(const __grid_constant__ TilesJob job) {
  if (static_cast<int>(blockIdx.y) >= job.tile_counts[0] + job.tile_counts[1]) return;
  const int block = blockIdx.x * kWarps + threadIdx.x / kWarp;
  if (block >= job.w.blocks()) return;
  const int4 tile = job.tiles[blockIdx.y];
  for (int row = 0; row < tile.z; row += 8 * kMaxGroups) {
    if (tile.z - row <= 8) {
      multiply<kCoding, kExact, 1>(job, tile, row, block);
    } else {
      multiply<kCoding, kExact, kMaxGroups>(job, tile, row, block);
    }
  }
}

template <Coding kCoding, bool kExact>
void launch(const TilesJob& job, int max_tiles, cudaStream_t stream) {
  const dim3 grid(ceil_div(job.w.blocks(), kWarps), max_tiles);
  plain_kernel<kCoding, kExact><<<grid, kWarps * kWarp, 0, stream>>>(job);
  check_launch("tiles_plain");
}

}  // namespace

void tiles_plain(const TilesJob& job, int max_tiles, cudaStream_t stream) {
  switch (job.w.coding) {
    case Coding::kCcq:
      if (job.w.proven) return launch<Coding::kCcq, false>(job, max_tiles, stream);
      return launch<Coding::kCcq, true>(job, max_tiles, stream);
    case Coding::kInt4:
      return launch<Coding::kInt4, false>(job, max_tiles, stream);
    case Coding::kInt8:
      return launch<Coding::kInt8, false>(job, max_tiles, stream);
  }
}

}  // namespace fd::cuda

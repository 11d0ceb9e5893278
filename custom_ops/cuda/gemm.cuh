// y = x W for tiled weights: one kernel for a few tokens (a stream of weights), one for many (mma
// tiles). Both serve plain linears and the experts of a MoE layer; GATED fuses silu(x Wg) * (x Wu).
#pragma once

#include "gemm.h"
#include "weight_tiles.cuh"

namespace fd::cuda {

/// The rows of x that one block column works on.
struct RowTile {
  int expert;
  int first;  // first row of the tile in sorted order
  int count;  // 0: nothing to do
};

__device__ __forceinline__ RowTile find_tile(const GemmRows& rows, int index, int height) {
  if (rows.tiles != nullptr) {
    const int4 tile = rows.tiles[index];
    return {tile.x, tile.y, tile.z};
  }
  if (rows.expert_of_row != nullptr) return {rows.expert_of_row[index], index, 1};
  const int first = index * height;
  return {0, first, min(height, rows.count - first)};
}

/// Row of x for sorted row `row`.
__device__ __forceinline__ int source_row(const GemmRows& rows, int row) {
  if (!rows.gather) return row;
  const int slot = rows.slot_of_row != nullptr ? rows.slot_of_row[row] : row;
  return slot / rows.source_divisor;
}

/// Row of the output for sorted row `row`.
__device__ __forceinline__ int target_row(const GemmRows& rows, int row) {
  return rows.scatter && rows.slot_of_row != nullptr ? rows.slot_of_row[row] : row;
}

__device__ __forceinline__ float silu(float x) { return x / (1.0f + __expf(-x)); }

__device__ __forceinline__ void store_output(const GemmParams& p, int64_t index, float value) {
  if (p.out_float != nullptr) {
    p.out_float[index] = value;
  } else {
    p.out[index] = __float2bfloat16_rn(value);
  }
}

// ---------------------------------------------------------------------------------------------------------
// Few rows: every warp walks down one column block of W with its own share of the k tiles.
// ---------------------------------------------------------------------------------------------------------

constexpr int kSkinnyWarps = 8;

/// Blocks of the streaming kernel that fit on an SM, as its launch bounds ask for.
constexpr int resident_blocks(bool gated, int token_tiles) {
  return token_tiles == 1 && !gated ? 3 : token_tiles == 8 ? 1 : 2;
}

/// Vectors of one or two (GATED) column blocks for one k tile.
template <Kind kKind, int kStreams>
struct Stage {
  uint4 v[kStreams][tile_vectors(kKind)];
  uint32_t scale[kStreams];
};

template <Kind kKind, int kStreams>
__device__ __forceinline__ void load_stage(Stage<kKind, kStreams>& stage, const TiledWeight& w,
                                           const int64_t (&block)[kStreams], int k_tile, int lane) {
  constexpr int kVectors = tile_vectors(kKind);
#pragma unroll
  for (int s = 0; s < kStreams; ++s) {
    const int64_t tile = block[s] * w.k_tiles + k_tile;
    const uint4* p = w.tiles + tile * (kVectors * kWarp) + lane;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) stage.v[s][i] = load_stream(p + i * kWarp);
    if constexpr (is_ccq(kKind)) stage.scale[s] = __ldg(w.local_scale + tile * 8 + lane / 4);
  }
}

/// CCQ with one token tile multiplies bare fields and scales the sums of each 64-row group: exact,
/// and 4 products a group instead of 16 packed ones. More token tiles cannot afford sums per group:
/// they scale the weights, rounded to bf16 as in the tile kernel.
constexpr bool scales_groups(Kind kind, int token_tiles) {
  return is_ccq(kind) && token_tiles == 1;
}

/// Local scales of columns g and g + 8 as packed bf16 pairs, and -160 times them (exact: 160 * 15
/// has 7 bits).
struct WeightScales {
  uint32_t scale[2];
  uint32_t offset[2];
};

template <int kGroup>
__device__ __forceinline__ WeightScales weight_scales(uint32_t pair, const LaneColumns& columns) {
  float value[2];
  local_scales<kGroup>(pair, columns.constants, value);
  WeightScales out;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    out.scale[i] = pack_bf16(value[i], value[i]);
    out.offset[i] = pack_bf16(-160.0f * value[i], -160.0f * value[i]);
  }
  return out;
}

/// bf16(field * local scale) from 128 + field: one fused rounding, exact inside.
__device__ __forceinline__ void scale_fragment(uint32_t (&a)[4], const WeightScales& scales) {
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = fma2(a[i], scales.scale[i % 2], scales.offset[i % 2]);
}

template <Kind kKind, int kTokenTiles, int kChunk, int kStep>
__device__ __forceinline__ void multiply_step(const uint4 (&v)[tile_vectors(kKind)],
                                              const LaneColumns& columns,
                                              const WeightScales& scales,
                                              const uint4 (&x)[kTokenTiles], int token_tiles,
                                              float (&sums)[kTokenTiles][4]) {
  uint32_t a[4];
  decode_fragment<kKind, kChunk, kStep>(v, columns, a);
  if constexpr (is_ccq(kKind) && kTokenTiles > 1) scale_fragment(a, scales);
#pragma unroll
  for (int j = 0; j < kTokenTiles; ++j) {
    if (kTokenTiles == 1 || j < token_tiles) {
      mma(sums[j], a, component(x[j], 2 * kStep), component(x[j], 2 * kStep + 1));
    }
  }
}

/// Begins or continues a group's sum with -160 times the sum of x: the idle tensor core takes off
/// the offset of the fields cheaper than the busy ALUs would.
template <int kChunk>
__device__ __forceinline__ void subtract_offset(const uint32_t (&offset)[4], const uint4& x,
                                                float (&sums)[4]) {
  if constexpr (kChunk % 2 == 0) {
    mma_first(sums, offset, x.x, x.y);
  } else {
    mma(sums, offset, x.x, x.y);
  }
  mma(sums, offset, x.z, x.w);
}

/// What a warp carries from chunk to chunk.
template <Kind kKind, int kStreams, int kTokenTiles>
struct WarpProduct {
  static constexpr bool kGroups = scales_groups(kKind, kTokenTiles);
  static constexpr bool kPrefetch = kTokenTiles <= 2;  // registers for the next chunk's x
  const bf16* x_row[kTokenTiles];
  int limit;        // first k past the row, as seen from this lane's offset in a chunk
  int token_tiles;  // in use
  LaneColumns columns[kStreams];
  uint4 x_next[kPrefetch ? kTokenTiles : 1];
  float sums[kStreams][kTokenTiles][4];
  float scaled[kGroups ? kStreams : 1][4];  // groups times their local scales
  uint32_t offset[4];  // -160 everywhere, held: constants would be moved in for every product

  /// `zeros`: an int below 2^16; its high bits are a zero that the compiler cannot know, different
  /// for each i.
  __device__ void clear(int zeros) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (kGroups) offset[i] = kMinus160 ^ (static_cast<uint32_t>(zeros) >> (20 + i));
    }
#pragma unroll
    for (int s = 0; s < kStreams; ++s) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (kGroups) scaled[s][i] = 0.0f;
#pragma unroll
        for (int j = 0; j < kTokenTiles; ++j) sums[s][j][i] = 0.0f;
      }
    }
  }

  __device__ float total(int s, int j, int i) const {
    return kGroups ? scaled[kGroups ? s : 0][i] : sums[s][j][i];
  }

  __device__ void load_x(uint4 (&x)[kTokenTiles], int k) const {
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) {
      const bool valid = x_row[j] != nullptr && k < limit;
      x[j] = valid ? __ldg(reinterpret_cast<const uint4*>(x_row[j] + k)) : make_uint4(0, 0, 0, 0);
    }
  }
};

/// 32 rows of the tile at k. With prefetch the next chunk's x is requested first: its latency hides
/// behind this one.
template <Kind kKind, int kStreams, int kTokenTiles, int kChunk>
__device__ __forceinline__ void multiply_chunk(const Stage<kKind, kStreams>& stage, int k,
                                               int next_k,
                                               WarpProduct<kKind, kStreams, kTokenTiles>& warp) {
  uint4 x[kTokenTiles];
  if constexpr (warp.kPrefetch) {
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) x[j] = warp.x_next[j];
    warp.load_x(warp.x_next, kChunk + 1 < kChunks ? k + 32 * (kChunk + 1) : next_k);
  } else {
    warp.load_x(x, k + 32 * kChunk);
  }
  if constexpr (warp.kGroups) {
#pragma unroll
    for (int s = 0; s < kStreams; ++s) subtract_offset<kChunk>(warp.offset, x[0], warp.sums[s][0]);
  }
#pragma unroll
  for (int s = 0; s < kStreams; ++s) {
    WeightScales scales{};
    if constexpr (is_ccq(kKind) && kTokenTiles > 1) {
      scales = weight_scales<kChunk / 2>(stage.scale[s], warp.columns[s]);
    }
    multiply_step<kKind, kTokenTiles, kChunk, 0>(stage.v[s], warp.columns[s], scales, x,
                                                 warp.token_tiles, warp.sums[s]);
    multiply_step<kKind, kTokenTiles, kChunk, 1>(stage.v[s], warp.columns[s], scales, x,
                                                 warp.token_tiles, warp.sums[s]);
    if constexpr (warp.kGroups && kChunk % 2 == 1) {
      float scale[2];
      local_scales<kChunk / 2>(stage.scale[s], warp.columns[s].constants, scale);
#pragma unroll
      for (int i = 0; i < 4; ++i) warp.scaled[s][i] += scale[i / 2] * warp.sums[s][0][i];
    }
  }
}

template <Kind kKind, int kStreams, int kTokenTiles>
__device__ __forceinline__ void multiply_tile(const Stage<kKind, kStreams>& stage, int k,
                                              int next_k,
                                              WarpProduct<kKind, kStreams, kTokenTiles>& warp) {
  multiply_chunk<kKind, kStreams, kTokenTiles, 0>(stage, k, next_k, warp);
  multiply_chunk<kKind, kStreams, kTokenTiles, 1>(stage, k, next_k, warp);
  multiply_chunk<kKind, kStreams, kTokenTiles, 2>(stage, k, next_k, warp);
  multiply_chunk<kKind, kStreams, kTokenTiles, 3>(stage, k, next_k, warp);
}

/// Bytes in flight hide DRAM latency: 2 KiB of weights a warp, so 32 KiB on an SM with 16 warps.
constexpr int stage_depth(Kind kind, int streams, int token_tiles) {
  const int budget = token_tiles >= 4 ? 2 : 4;  // vectors per lane; many tokens need the registers
  const int depth = budget / (tile_vectors(kind) * streams);
  return depth < 1 ? 1 : depth;
}

template <Kind kKind, bool kGated, int kTokenTiles>
__global__ void __launch_bounds__(kSkinnyWarps* kWarp, (kTokenTiles == 1 && !kGated) ? 3
                                                       : kTokenTiles == 8            ? 1
                                                                                     : 2)
    skinny_gemm(const TiledWeight w, const GemmParams p, int split) {
  constexpr int kStreams = kGated ? 2 : 1;
  constexpr int kDepth = stage_depth(kKind, kStreams, kTokenTiles);
  constexpr int kTokens = 8 * kTokenTiles;
  __shared__ float partial[kSkinnyWarps][kStreams][kTokens][kTileColumns + 1];

  const RowTile tile = find_tile(p.rows, blockIdx.y, kTokens);
  if (tile.count <= 0) return;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int g = lane / 4, c = lane % 4;
  const int part = warp % split;
  const int blocks_here = kSkinnyWarps / split;
  const int out_tiles = kGated ? w.n_tiles / 2 : w.n_tiles;
  const int block = blockIdx.x * blocks_here + warp / split;

  WarpProduct<kKind, kStreams, kTokenTiles> product;
  product.clear(split);
  if (block < out_tiles) {
    int64_t stream_block[kStreams];
#pragma unroll
    for (int s = 0; s < kStreams; ++s) {
      stream_block[s] = int64_t{tile.expert} * w.n_tiles + block + s * out_tiles;
      product.columns[s] = load_columns<kKind>(w, stream_block[s] * kTileColumns + g);
    }
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) {
      const int row = 8 * j + g;
      product.x_row[j] =
          row < tile.count
              ? p.x + int64_t{source_row(p.rows, tile.first + row)} * w.in_features + 8 * c
              : nullptr;
    }
    product.limit = w.in_features - 8 * c;
    product.token_tiles = (tile.count + 7) / 8;
    Stage<kKind, kStreams> stage[kDepth];
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      const int k_tile = part + d * split;
      if (k_tile < w.k_tiles) load_stage(stage[d], w, stream_block, k_tile, lane);
    }
    if constexpr (product.kPrefetch) {
      product.load_x(product.x_next, part * kTileRows);
    }
    for (int base = part; base < w.k_tiles; base += kDepth * split) {
#pragma unroll
      for (int d = 0; d < kDepth; ++d) {
        const int k_tile = base + d * split;
        if (k_tile < w.k_tiles) {
          multiply_tile(stage[d], k_tile * kTileRows, (k_tile + split) * kTileRows, product);
          const int next = k_tile + kDepth * split;
          if (next < w.k_tiles) load_stage(stage[d], w, stream_block, next, lane);
        }
      }
    }
  }
#pragma unroll
  for (int s = 0; s < kStreams; ++s) {
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        partial[warp][s][8 * j + 2 * c + i % 2][g + 8 * (i / 2)] = product.total(s, j, i);
      }
    }
  }
  __syncthreads();

  // The parts are added in a fixed order, so a result does not depend on timing.
  const int total = blocks_here * tile.count * kTileColumns;
  for (int i = threadIdx.x; i < total; i += kSkinnyWarps * kWarp) {
    const int n = i % kTileColumns;
    const int here = (i / kTileColumns) % blocks_here;
    const int row = i / (kTileColumns * blocks_here);
    const int out_block = blockIdx.x * blocks_here + here;
    const int column = out_block * kTileColumns + n;
    if (out_block >= out_tiles || column >= p.out_columns) continue;
    float sum[kStreams] = {};
#pragma unroll
    for (int s = 0; s < kStreams; ++s) {
      for (int q = 0; q < split; ++q) sum[s] += partial[here * split + q][s][row][n];
      if constexpr (kKind != Kind::kDense) {
        const int64_t scale = int64_t{tile.expert} * w.n_tiles + out_block + s * out_tiles;
        sum[s] *= w.column_scale[scale * kTileColumns + n];
      }
    }
    const float value = kGated ? silu(sum[0]) * sum[kStreams - 1] : sum[0];
    store_output(p, int64_t{target_row(p.rows, tile.first + row)} * p.out_columns + column, value);
  }
}

// ---------------------------------------------------------------------------------------------------------
// Many rows: 8 warps compute 128 columns x (64 or 128) tokens; x in shared memory, W straight into
// registers.
// ---------------------------------------------------------------------------------------------------------

constexpr int kWideThreads = 256;
constexpr int kWideColumns = 128;
constexpr int kWideStages = 2;
constexpr int kStagingStride = kWideColumns + 4;

/// x tiles in flight, later reused to turn the result for coalesced stores.
constexpr int wide_shared_bytes(int tokens) {
  const int stages = kWideStages * tokens * kTileRows * 2;
  const int staging = tokens * kStagingStride * 4;
  return stages > staging ? stages : staging;
}

/// 16-byte chunk position inside a row of 16 chunks: odd rows swap halves, so that the 8 lanes of
/// one shared-memory phase (two rows, four chunks) touch all 32 banks.
__device__ __forceinline__ int swizzle(int row, int chunk) { return chunk ^ ((row & 1) << 2); }

template <int kTokens>
__device__ __forceinline__ void load_x_tile(uint4* shared, const bf16* x, const int* sources,
                                            int count, int in_features, int k_tile) {
#pragma unroll
  for (int i = threadIdx.x; i < kTokens * 16; i += kWideThreads) {
    const int row = i / 16, chunk = i % 16;
    const int k = k_tile * kTileRows + chunk * 8;
    const bool valid = row < count && k < in_features;
    const bf16* from = valid ? x + int64_t{sources[row]} * in_features + k : x;
    copy_async(shared + row * 16 + swizzle(row, chunk), from, valid);
  }
}

template <Kind kKind, int kTokenTiles, int kChunk>
__device__ __forceinline__ void wide_chunk(const uint4 (&v)[2][tile_vectors(kKind)],
                                           const LaneColumns (&columns)[2],
                                           const uint32_t (&pair)[2], const uint4* x,
                                           float (&acc)[2][kTokenTiles][4]) {
  const int lane = threadIdx.x % kWarp, g = lane / 4, c = lane % 4;
  uint32_t a[2][2][4];
#pragma unroll
  for (int m = 0; m < 2; ++m) {
    decode_fragment<kKind, kChunk, 0>(v[m], columns[m], a[m][0]);
    decode_fragment<kKind, kChunk, 1>(v[m], columns[m], a[m][1]);
    if constexpr (is_ccq(kKind)) {
      const WeightScales scales = weight_scales<kChunk / 2>(pair[m], columns[m]);
      scale_fragment(a[m][0], scales);
      scale_fragment(a[m][1], scales);
    }
  }
#pragma unroll
  for (int j = 0; j < kTokenTiles; ++j) {
    const int row = 8 * j + g;
    const uint4 b = x[row * 16 + swizzle(row, 4 * kChunk + c)];
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      mma(acc[m][j], a[m][0], b.x, b.y);
      mma(acc[m][j], a[m][1], b.z, b.w);
    }
  }
}

template <Kind kKind, int kTokenTiles>
__device__ __forceinline__ void wide_tile(const uint4 (&v)[2][tile_vectors(kKind)],
                                          const LaneColumns (&columns)[2],
                                          const uint32_t (&pair)[2], const uint4* x,
                                          float (&acc)[2][kTokenTiles][4]) {
  wide_chunk<kKind, kTokenTiles, 0>(v, columns, pair, x, acc);
  wide_chunk<kKind, kTokenTiles, 1>(v, columns, pair, x, acc);
  wide_chunk<kKind, kTokenTiles, 2>(v, columns, pair, x, acc);
  wide_chunk<kKind, kTokenTiles, 3>(v, columns, pair, x, acc);
}

template <Kind kKind, bool kGated, int kTokenTiles>
__global__ void __launch_bounds__(kWideThreads, 1)
    wide_gemm(const TiledWeight w, const GemmParams p) {
  constexpr int kTokens = 16 * kTokenTiles;  // two warps side by side
  constexpr int kVectors = tile_vectors(kKind);
  extern __shared__ uint4 shared[];
  __shared__ int sources[kTokens];

  const RowTile tile = find_tile(p.rows, blockIdx.y, kTokens);
  if (tile.count <= 0) return;
  if (threadIdx.x < kTokens) {
    const int row = min(static_cast<int>(threadIdx.x), tile.count - 1);
    sources[threadIdx.x] = source_row(p.rows, tile.first + row);
  }
  __syncthreads();

  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int g = lane / 4, c = lane % 4;
  const int warp_m = warp % 4, warp_n = warp / 4;
  const int out_tiles = kGated ? w.n_tiles / 2 : w.n_tiles;
  // GATED: the warp's two column blocks are a gate block and the up block that belongs to it
  int64_t block[2];
  LaneColumns columns[2];
#pragma unroll
  for (int m = 0; m < 2; ++m) {
    const int here =
        kGated ? min(static_cast<int>(blockIdx.x) * 4 + warp_m, out_tiles - 1) + m * out_tiles
               : min(static_cast<int>(blockIdx.x) * 8 + warp_m * 2 + m, out_tiles - 1);
    block[m] = int64_t{tile.expert} * w.n_tiles + here;
    columns[m] = load_columns<kKind>(w, block[m] * kTileColumns + g);
  }

  float acc[2][kTokenTiles][4] = {};
  load_x_tile<kTokens>(shared, p.x, sources, tile.count, w.in_features, 0);
  copy_commit();
  constexpr bool kPrefetch = kKind != Kind::kDense;  // dense tiles would need 64 more registers
  Stage<kKind, 2> stage;
  if (kPrefetch) load_stage(stage, w, block, 0, lane);
  for (int k_tile = 0; k_tile < w.k_tiles; ++k_tile) {
    copy_wait<0>();
    __syncthreads();
    if (k_tile + 1 < w.k_tiles) {
      load_x_tile<kTokens>(shared + ((k_tile + 1) % kWideStages) * kTokens * 16, p.x, sources,
                           tile.count, w.in_features, k_tile + 1);
    }
    copy_commit();
    if (!kPrefetch) load_stage(stage, w, block, k_tile, lane);
    uint4 v[2][kVectors];
    uint32_t pair[2];
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) v[m][i] = stage.v[m][i];
      pair[m] = is_ccq(kKind) ? stage.scale[m] : 0u;
    }
    if (kPrefetch && k_tile + 1 < w.k_tiles) load_stage(stage, w, block, k_tile + 1, lane);
    const uint4* x = shared + (k_tile % kWideStages) * kTokens * 16 + warp_n * (kTokens / 2) * 16;
    wide_tile<kKind, kTokenTiles>(v, columns, pair, x, acc);
  }
  __syncthreads();

  float* staging = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int m = 0; m < 2; ++m) {
    float scale[2] = {1.0f, 1.0f};
    if constexpr (kKind != Kind::kDense) {
#pragma unroll
      for (int i = 0; i < 2; ++i) scale[i] = w.column_scale[block[m] * kTileColumns + g + 8 * i];
    }
    const int column = kGated ? m * 64 + warp_m * 16 : warp_m * 32 + m * 16;
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = warp_n * (kTokens / 2) + 8 * j + 2 * c + i % 2;
        staging[token * kStagingStride + column + g + 8 * (i / 2)] = acc[m][j][i] * scale[i / 2];
      }
    }
  }
  __syncthreads();
  constexpr int kOut = kGated ? kWideColumns / 2 : kWideColumns;
  for (int i = threadIdx.x; i < tile.count * kOut; i += kWideThreads) {
    const int token = i / kOut, n = i % kOut;
    const int column = blockIdx.x * kOut + n;
    if (column >= p.out_columns) continue;
    const float* row = staging + token * kStagingStride;
    const float value = kGated ? silu(row[n]) * row[n + 64] : row[n];
    store_output(p, int64_t{target_row(p.rows, tile.first + token)} * p.out_columns + column,
                 value);
  }
}

// ---------------------------------------------------------------------------------------------------------
// Launch
// ---------------------------------------------------------------------------------------------------------

constexpr int kSkinnyOverhead =
    3;  // k tiles' worth of time that a warp spends before and after its loop
constexpr int kBusyBlocks = 2;  // blocks an SM needs to hide its latencies

/// Warps that share one column block, chosen for the least time of the busiest SM: its blocks run
/// in rounds of `resident`, and a round of few blocks takes as long as one of kBusyBlocks.
inline int choose_split(int blocks, int row_tiles, int k_tiles, int resident, int multiprocessors) {
  int best = 1;
  int64_t least = INT64_MAX;
  for (int split = 1; split <= kSkinnyWarps && split <= k_tiles; split *= 2) {
    const int64_t total = int64_t{ceil_div(blocks * split, kSkinnyWarps)} * row_tiles;
    const int64_t busiest = ceil_div<int64_t>(total, multiprocessors);
    const int64_t rest = busiest % resident;
    const int64_t rounds = busiest - rest +
                           (rest == 0            ? 0
                            : rest < kBusyBlocks ? kBusyBlocks
                                                 : rest);
    const int64_t time = rounds * (ceil_div(k_tiles, split) + kSkinnyOverhead);
    if (time < least) {
      least = time;
      best = split;
    }
  }
  return best;
}

inline int multiprocessor_count() {
  static const int count = [] {
    int device = 0, found = 0;
    check(cudaGetDevice(&device), "gemm: device");
    check(cudaDeviceGetAttribute(&found, cudaDevAttrMultiProcessorCount, device), "gemm: device");
    return found;
  }();
  return count;
}

template <Kind kKind, bool kGated, int kTokenTiles>
void launch_skinny(const TiledWeight& w, const GemmParams& p, int row_tiles, cudaStream_t stream) {
  const int blocks = kGated ? w.n_tiles / 2 : w.n_tiles;
  const int split = choose_split(blocks, row_tiles, w.k_tiles, resident_blocks(kGated, kTokenTiles),
                                 multiprocessor_count());
  const dim3 grid(ceil_div(blocks, kSkinnyWarps / split), row_tiles);
  skinny_gemm<kKind, kGated, kTokenTiles><<<grid, kSkinnyWarps * kWarp, 0, stream>>>(w, p, split);
  check_launch("skinny_gemm");
}

template <Kind kKind, bool kGated, int kTokenTiles>
void launch_wide(const TiledWeight& w, const GemmParams& p, int row_tiles, cudaStream_t stream) {
  constexpr int kBytes = wide_shared_bytes(16 * kTokenTiles);
  auto kernel = wide_gemm<kKind, kGated, kTokenTiles>;
  static const cudaError_t raised = cudaFuncSetAttribute(
      reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  check(raised, "wide_gemm: shared memory");
  const int blocks = kGated ? w.n_tiles / 2 : w.n_tiles;
  const dim3 grid(ceil_div(blocks, kGated ? 4 : 8), row_tiles);
  kernel<<<grid, kWideThreads, kBytes, stream>>>(w, p);
  check_launch("wide_gemm");
}

/// Runs the kernel whose tiles are `tile_rows` rows high: wide 64 or 128, else 8, 16, 32 or (not
/// GATED) 64.
template <Kind kKind, bool kGated>
void run_gemm(const TiledWeight& w, const GemmParams& p, bool wide, int tile_rows, int row_tiles,
              cudaStream_t stream) {
  if (wide && tile_rows == 64) return launch_wide<kKind, kGated, 4>(w, p, row_tiles, stream);
  if (wide && tile_rows == 128) return launch_wide<kKind, kGated, 8>(w, p, row_tiles, stream);
  if (!wide && tile_rows == 8) return launch_skinny<kKind, kGated, 1>(w, p, row_tiles, stream);
  if (!wide && tile_rows == 16) return launch_skinny<kKind, kGated, 2>(w, p, row_tiles, stream);
  if (!wide && tile_rows == 32) return launch_skinny<kKind, kGated, 4>(w, p, row_tiles, stream);
  if constexpr (!kGated) {
    if (!wide && tile_rows == 64) return launch_skinny<kKind, kGated, 8>(w, p, row_tiles, stream);
  }
  throw std::runtime_error("gemm: no kernel for row tiles of " + std::to_string(tile_rows));
}

}  // namespace fd::cuda

// Up to 16 rows a tile: every warp walks down one column block of W through one part of K,
// a stream of weights straight into registers.
#pragma once

#include "gemm_rows.cuh"

namespace fd::cuda {

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

/// What a warp carries through its part of K.
template <Kind kKind, int kStreams, int kTokenTiles>
struct WarpProduct {
  static constexpr bool kGroups = is_ccq(kKind);
  /// 32-row chunks of x that one step takes: CCQ begins a group with all of its x.
  static constexpr int kSpan = kGroups ? 2 : 1;

  const bf16* x_row[kTokenTiles];
  int limit;  // first k past the row, as seen from this lane's offset in a chunk
  LaneColumns columns[kStreams];
  uint4 x_next[kTokenTiles][kSpan];
  float sums[kStreams][kTokenTiles][4];
  uint32_t offset[4];  // -160 everywhere, held: constants would be moved in for every product

  /// `zeros`: an int below 2^16; its high bits are a zero that the compiler cannot know, different
  /// for each i.
  __device__ void clear(int zeros) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (kGroups) offset[i] = kMinus160 ^ (static_cast<uint32_t>(zeros) >> (20 + i));
#pragma unroll
      for (int s = 0; s < kStreams; ++s) {
#pragma unroll
        for (int j = 0; j < kTokenTiles; ++j) sums[s][j][i] = 0.0f;
      }
    }
  }

  /// Hands over the x requested last and requests the next at `k`: its latency hides behind the
  /// products in between.
  __device__ void take_x(uint4 (&x)[kTokenTiles][kSpan], int k) {
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) {
#pragma unroll
      for (int i = 0; i < kSpan; ++i) x[j][i] = x_next[j][i];
    }
    request_x(k);
  }

  __device__ void request_x(int k) {
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) {
#pragma unroll
      for (int i = 0; i < kSpan; ++i) {
        const bool valid = x_row[j] != nullptr && k + 32 * i < limit;
        x_next[j][i] =
            valid ? *reinterpret_cast<const uint4*>(x_row[j] + k + 32 * i) : make_uint4(0, 0, 0, 0);
      }
    }
  }
};

/// 32 rows of the tile at k; not for CCQ.
template <Kind kKind, int kStreams, int kTokenTiles, int kChunk>
__device__ __forceinline__ void multiply_chunk(const Stage<kKind, kStreams>& stage, int k,
                                               WarpProduct<kKind, kStreams, kTokenTiles>& warp) {
  uint4 x[kTokenTiles][1];
  warp.take_x(x, k + 32 * (kChunk + 1));
#pragma unroll
  for (int s = 0; s < kStreams; ++s) {
    uint32_t a[2][4];
    decode_fragment<kKind, kChunk, 0>(stage.v[s], warp.columns[s], a[0]);
    decode_fragment<kKind, kChunk, 1>(stage.v[s], warp.columns[s], a[1]);
#pragma unroll
    for (int step = 0; step < 2; ++step) {
#pragma unroll
      for (int j = 0; j < kTokenTiles; ++j) {
        mma(warp.sums[s][j], a[step], component(x[j][0], 2 * step),
            component(x[j][0], 2 * step + 1));
      }
    }
  }
}

/// k-step `kStep` of a CCQ group, continuing `from`.
template <Kind kKind, int kTokenTiles, int kGroup, int kStep>
__device__ __forceinline__ void group_step(const uint4 (&v)[tile_vectors(kKind)],
                                           const LaneColumns& columns,
                                           const uint4 (&x)[kTokenTiles][2],
                                           const float (&from)[kTokenTiles][4],
                                           float (&sum)[kTokenTiles][4]) {
  uint32_t a[4];
  decode_fragment<kKind, 2 * kGroup + kStep / 2, kStep % 2>(v, columns, a);
#pragma unroll
  for (int j = 0; j < kTokenTiles; ++j) {
    const uint4& b = x[j][kStep / 2];
    mma_onto(sum[j], a, component(b, 2 * (kStep % 2)), component(b, 2 * (kStep % 2) + 1), from[j]);
  }
}

/// One 64-row group of CCQ at k: see gemm_rows.cuh for the product that it computes.
template <Kind kKind, int kStreams, int kTokenTiles, int kGroup>
__device__ __forceinline__ void multiply_group(const Stage<kKind, kStreams>& stage, int k,
                                               WarpProduct<kKind, kStreams, kTokenTiles>& warp) {
  uint4 x[kTokenTiles][2];
  warp.take_x(x, k + 64 * (kGroup + 1));
  float offsets[kTokenTiles][4];
  group_offsets<kTokenTiles>(warp.offset, x, offsets);
#pragma unroll
  for (int s = 0; s < kStreams; ++s) {
    const uint4(&v)[tile_vectors(kKind)] = stage.v[s];
    float sum[kTokenTiles][4];
    group_step<kKind, kTokenTiles, kGroup, 0>(v, warp.columns[s], x, offsets, sum);
    group_step<kKind, kTokenTiles, kGroup, 1>(v, warp.columns[s], x, sum, sum);
    group_step<kKind, kTokenTiles, kGroup, 2>(v, warp.columns[s], x, sum, sum);
    group_step<kKind, kTokenTiles, kGroup, 3>(v, warp.columns[s], x, sum, sum);
    float scale[2];
    local_scales<kGroup>(stage.scale[s], warp.columns[s].constants, scale);
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        warp.sums[s][j][i] = __fmaf_rn(scale[i / 2], sum[j][i], warp.sums[s][j][i]);
      }
    }
  }
}

template <Kind kKind, int kStreams, int kTokenTiles>
__device__ __forceinline__ void multiply_tile(const Stage<kKind, kStreams>& stage, int k,
                                              WarpProduct<kKind, kStreams, kTokenTiles>& warp) {
  if constexpr (is_ccq(kKind)) {
    multiply_group<kKind, kStreams, kTokenTiles, 0>(stage, k, warp);
    multiply_group<kKind, kStreams, kTokenTiles, 1>(stage, k, warp);
  } else {
    multiply_chunk<kKind, kStreams, kTokenTiles, 0>(stage, k, warp);
    multiply_chunk<kKind, kStreams, kTokenTiles, 1>(stage, k, warp);
    multiply_chunk<kKind, kStreams, kTokenTiles, 2>(stage, k, warp);
    multiply_chunk<kKind, kStreams, kTokenTiles, 3>(stage, k, warp);
  }
}

/// Bytes in flight hide DRAM latency: 2 KiB of weights a warp, so 32 KiB on an SM with 16 warps.
constexpr int stage_depth(Kind kind, int streams) {
  const int depth = 4 / (tile_vectors(kind) * streams);
  return depth < 1 ? 1 : depth;
}

/// A block's 8 warps: all `parts` of K for 8 / parts column blocks.
template <Kind kKind, bool kGated, int kTokenTiles>
__global__ void __launch_bounds__(kSkinnyWarps* kWarp, resident_blocks(kGated, kTokenTiles))
    skinny_gemm(const TiledWeight w, const GemmParams p, int parts) {
  constexpr int kStreams = kGated ? 2 : 1;
  constexpr int kDepth = stage_depth(kKind, kStreams);
  constexpr int kTokens = 8 * kTokenTiles;
  __shared__ float partial[kSkinnyWarps][kStreams][kTokens][kTileColumns + 1];

  const bool routed = p.rows.tiles != nullptr || p.rows.expert_of_row != nullptr;
  if (routed) wait_for_inputs();
  const RowTile tile = find_tile(p.rows, blockIdx.y, kTokens);
  if (tile.count <= 0) return;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int g = lane / 4, c = lane % 4;
  const int part = warp % parts;
  const int blocks_here = kSkinnyWarps / parts;
  const int out_tiles = kGated ? w.n_tiles / 2 : w.n_tiles;
  const int block = blockIdx.x * blocks_here + warp / parts;

  WarpProduct<kKind, kStreams, kTokenTiles> product;
  product.clear(parts);
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
    const int begin = part_begin(w, part, parts), end = part_begin(w, part + 1, parts);
    Stage<kKind, kStreams> stage[kDepth];
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      if (begin + d < end) load_stage(stage[d], w, stream_block, begin + d, lane);
    }
    if (!routed) wait_for_inputs();  // the first weights come while the kernel ahead still runs
    product.request_x(begin * kTileRows);
    for (int base = begin; base < end; base += kDepth) {
#pragma unroll
      for (int d = 0; d < kDepth; ++d) {
        const int k_tile = base + d;
        if (k_tile < end) {
          multiply_tile(stage[d], k_tile * kTileRows, product);
          if (k_tile + kDepth < end) load_stage(stage[d], w, stream_block, k_tile + kDepth, lane);
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
        partial[warp][s][8 * j + 2 * c + i % 2][g + 8 * (i / 2)] = product.sums[s][j][i];
      }
    }
  }
  __syncthreads();

  const int total = blocks_here * tile.count * kTileColumns;
  for (int i = threadIdx.x; i < total; i += kSkinnyWarps * kWarp) {
    const int n = i % kTileColumns;
    const int here = (i / kTileColumns) % blocks_here;
    const int row = i / (kTileColumns * blocks_here);
    const int out_block = blockIdx.x * blocks_here + here;
    const int column = out_block * kTileColumns + n;
    if (out_block >= out_tiles || column >= p.out_columns) continue;
    float sum[kStreams], scale[kStreams];
#pragma unroll
    for (int s = 0; s < kStreams; ++s) {
      sum[s] = partial[here * parts][s][row][n];
      for (int q = 1; q < parts; ++q) {
        sum[s] = __fadd_rn(sum[s], partial[here * parts + q][s][row][n]);
      }
      const int64_t weight_block = int64_t{tile.expert} * w.n_tiles + out_block + s * out_tiles;
      scale[s] = column_scale<kKind>(w, weight_block * kTileColumns + n);
    }
    const float value = finished<kGated>(sum[0], sum[kStreams - 1], scale[0], scale[kStreams - 1]);
    store_output(p, int64_t{target_row(p.rows, tile.first + row)} * p.out_columns + column, value);
  }
}

}  // namespace fd::cuda

// More rows: 4 warps compute 128 columns x (32, 64 or 128) tokens; x in shared memory, W straight
// into registers.
#pragma once

#include "gemm_skinny.cuh"

namespace fd::cuda {

constexpr int kWideWarps = 4;
constexpr int kWideThreads = kWideWarps * kWarp;
constexpr int kWideBlocks = 2;  // column blocks of a warp: halves the reads of x for each product
static_assert(kWideColumns == kWideWarps * kWideBlocks * kTileColumns);
constexpr int kWideStages = 3;
constexpr int kPair = 2;  // token tiles worked on together
constexpr int kStagingStride = kWideColumns + 4;

/// A block's tokens: every warp computes its own columns for all of them, so that no weight is
/// decoded twice. Small blocks, several to an SM, do not wait at each other's barriers: one decodes
/// while another multiplies.
template <Kind kKind, int kTokens>
struct WideShape {
  static constexpr int kTokenTiles = kTokens / 8;
  static constexpr int kStageVectors = kTokens * 16;  // 16-byte vectors of an x tile
  /// CCQ has two sets of sums, of a group and of all: more than 64 tokens have no registers.
  static constexpr int kResident = kTokens == 32 ? 4 : kTokens == 64 && !is_ccq(kKind) ? 3 : 2;

  /// x tiles in flight and the offsets of two; later reused to turn the result for coalesced
  /// stores.
  static constexpr int shared_bytes() {
    const int stages = kWideStages * kStageVectors * 16 + (is_ccq(kKind) ? 2 * kTokens * 16 : 0);
    const int staging = kTokens * kStagingStride * 4;
    return stages > staging ? stages : staging;
  }
};

/// 16-byte chunk position inside a row of 16 chunks: odd rows swap halves, so that the 8 lanes of
/// one shared-memory phase (two rows, four chunks) touch all 32 banks.
__device__ __forceinline__ int swizzle(int row, int chunk) { return chunk ^ ((row & 1) << 2); }

/// A thread's share of copying x tiles to shared memory: one chunk of every 8th row.
template <int kTokens>
struct XCopies {
  static constexpr int kCopies = kTokens * 16 / kWideThreads;
  static constexpr uint32_t kNone = ~0u;

  const bf16* x;
  int limit;                // first k past the row, as seen from this thread's chunk
  int target;               // of the first row, in a stage
  const uint32_t* sources;  // rows of x in 16-byte vectors; kNone past the tile's rows

  /// `rows`: shared memory for kTokens numbers, [first row][copy]; ready after a barrier.
  __device__ XCopies(const TiledWeight& w, const GemmParams& p, const RowTile& tile, uint32_t* rows)
      : x(p.x + 8 * (threadIdx.x % 16)), limit(w.in_features - 8 * (threadIdx.x % 16)) {
    const int first = threadIdx.x / 16;
    target = first * 16 + swizzle(first, threadIdx.x % 16);
    sources = rows + first * kCopies;
    if (threadIdx.x >= kTokens) return;
    const int row = threadIdx.x;
    rows[row % 8 * kCopies + row / 8] =
        row < tile.count ? static_cast<uint32_t>(source_row(p.rows, tile.first + row)) *
                               static_cast<uint32_t>(w.in_features / 8)
                         : kNone;
  }

  __device__ void request(uint4* stage, int k_tile) const {
    const bool inside = k_tile * kTileRows < limit;
    uint4 rows[kCopies / 4];  // all of them first: a copy orders the reads behind it
#pragma unroll
    for (int i = 0; i < kCopies / 4; ++i) rows[i] = reinterpret_cast<const uint4*>(sources)[i];
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const uint32_t source = component(rows[i / 4], i % 4);
      const bool valid = inside && source != kNone;
      const int64_t from = valid ? (int64_t{source} + k_tile * (kTileRows / 8)) * 8 : 0;
      copy_async(stage + target + 128 * i, x + from, valid);
    }
  }
};

/// Offsets of an x tile: each warp computes those of a share of the (token tile, group) pairs. They
/// are computed a tile ahead, and stored only after half a tile's products: nobody waits for them.
template <int kTokens>
struct TileOffsets {
  static constexpr int kMine = kTokens / 8 * 2 / kWideWarps;
  float sums[kMine][4];

  __device__ void compute(const uint4* x) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, c = lane % 4;
    const uint32_t offset[4] = {kMinus160, kMinus160, kMinus160, kMinus160};
    uint4 v[kMine][2];
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const int unit = warp + kWideWarps * i, group = unit % 2, row = unit / 2 * 8 + g;
#pragma unroll
      for (int h = 0; h < 2; ++h) v[i][h] = x[row * 16 + swizzle(g, 8 * group + 4 * h + c)];
    }
    group_offsets<kMine>(offset, v, sums);
  }

  /// To shared memory, [group][token pair]. A pair stands there twice, as the sums of a fragment's
  /// two columns begin. Lanes of equal c write the same: cheaper than choosing one.
  __device__ void store(float4* offsets) const {
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const int unit = threadIdx.x / kWarp + kWideWarps * i;
      offsets[unit % 2 * (kTokens / 2) + unit / 2 * 4 + threadIdx.x % 4] =
          make_float4(sums[i][0], sums[i][1], sums[i][0], sums[i][1]);
    }
  }
};

/// Sums of finished parts. The index has a zero in it that the compiler cannot know, which keeps
/// them in local memory: they are touched once a part, and the registers are needed.
template <int kSize>
struct PartSums {
  float sums[kSize];

  __device__ void add(bool first, int zero, float (&acc)[kSize]) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      sums[i + zero] = first ? acc[i] : __fadd_rn(sums[i + zero], acc[i]);
      acc[i] = 0.0f;
    }
  }
};

/// Registers of a warp: its column blocks, where their weights lie, and its sums.
template <Kind kKind, int kTokens>
struct WideProduct {
  static constexpr int kTokenTiles = WideShape<kKind, kTokens>::kTokenTiles;
  static constexpr int kVectors = tile_vectors(kKind);
  static constexpr int kSums = kWideBlocks * kTokenTiles * 4;

  LaneColumns columns[kWideBlocks];
  uint32_t next[kWideBlocks];  // this lane's first vector of the tile to load next
  Stage<kKind, kWideBlocks> stage;
  float acc[kSums];

  __device__ float (&at(int block, int j))[4] {
    return *reinterpret_cast<float (*)[4]>(acc + (block * kTokenTiles + j) * 4);
  }

  /// `block`: column block of the weight, all experts counted.
  __device__ void start(const TiledWeight& w, int b, int64_t block, int k_tile) {
    const int lane = threadIdx.x % kWarp;
    columns[b] = load_columns<kKind>(w, block * kTileColumns + lane / 4);
    next[b] = static_cast<uint32_t>((block * w.k_tiles + k_tile) * (kVectors * kWarp) + lane);
#pragma unroll
    for (int i = 0; i < kTokenTiles * 4; ++i) acc[b * kTokenTiles * 4 + i] = 0.0f;
  }

  /// Loads the vectors of one half of the next tile; the second half moves on. CCQ has a single
  /// vector for both: it comes with the second.
  template <int kHalf>
  __device__ void load(const TiledWeight& w) {
    constexpr int kFirst = kHalf == 1 ? kVectors / 2 : 0;
    constexpr int kEnd = kHalf == 0 ? kVectors / 2 : kVectors;
#pragma unroll
    for (int b = 0; b < kWideBlocks; ++b) {
#pragma unroll
      for (int i = kFirst; i < kEnd; ++i)
        stage.v[b][i] = load_stream(w.tiles + next[b] + i * kWarp);
      // 8 pairs a tile of 32 vectors
      if constexpr (kHalf == 1 && is_ccq(kKind))
        stage.scale[b] = __ldg(w.local_scale + next[b] / 4);
      if constexpr (kHalf == 1) next[b] += kVectors * kWarp;
    }
  }
};

/// Sums that begin with two tokens' offsets. Read anew for each fragment, which takes fewer
/// instructions than copying registers.
__device__ __forceinline__ void begin_with(const float4* offsets, float (&sum)[4]) {
  load_shared(shared_address(offsets), sum);
}

/// k-step `kStep` of kPair token tiles: independent products, so that none waits for the one
/// before.
template <int kStep>
__device__ __forceinline__ void wide_step(const uint32_t (&a)[kWideBlocks][4][4],
                                          const uint4 (&x)[kPair][2],
                                          float (&sum)[kWideBlocks][kPair][4]) {
#pragma unroll
  for (int i = 0; i < kPair; ++i) {
    const uint4& v = x[i][kStep / 2];
#pragma unroll
    for (int b = 0; b < kWideBlocks; ++b) {
      mma(sum[b][i], a[b][kStep], component(v, 2 * (kStep % 2)), component(v, 2 * (kStep % 2) + 1));
    }
  }
}

/// 64 rows of a tile times kPair token tiles from `j` on. `offsets`: CCQ, of this lane's first two
/// tokens.
template <Kind kKind, int kTokens>
__device__ __forceinline__ void wide_pair(WideProduct<kKind, kTokens>& product,
                                          const uint32_t (&a)[kWideBlocks][4][4],
                                          const uint4 (&x)[kPair][2],
                                          const float (&scale)[kWideBlocks][2],
                                          const float4* offsets, int j) {
  float sum[kWideBlocks][kPair][4];
#pragma unroll
  for (int i = 0; i < kPair; ++i) {
#pragma unroll
    for (int b = 0; b < kWideBlocks; ++b) {
      if constexpr (is_ccq(kKind)) {
        begin_with(offsets + 4 * i, sum[b][i]);
      } else {
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[b][i][e] = product.at(b, j + i)[e];
      }
    }
  }
  wide_step<0>(a, x, sum);
  wide_step<1>(a, x, sum);
  wide_step<2>(a, x, sum);
  wide_step<3>(a, x, sum);
#pragma unroll
  for (int b = 0; b < kWideBlocks; ++b) {
#pragma unroll
    for (int i = 0; i < kPair; ++i) {
      float (&acc)[4] = product.at(b, j + i);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        acc[e] = is_ccq(kKind) ? __fmaf_rn(scale[b][e / 2], sum[b][i][e], acc[e]) : sum[b][i][e];
      }
    }
  }
}

/// 64 rows of the tile in the stage; `more` reloads that half with the next tile as soon as its
/// registers are free.
template <Kind kKind, int kTokens, int kGroup>
__device__ __forceinline__ void wide_group(WideProduct<kKind, kTokens>& product,
                                           const TiledWeight& w, bool more, const uint4* x,
                                           const float4* offsets) {
  const int lane = threadIdx.x % kWarp, g = lane / 4, c = lane % 4;
  uint32_t a[kWideBlocks][4][4];
  float scale[kWideBlocks][2];
#pragma unroll
  for (int b = 0; b < kWideBlocks; ++b) {
    const LaneColumns& columns = product.columns[b];
    const uint4(&v)[tile_vectors(kKind)] = product.stage.v[b];
    decode_fragment<kKind, 2 * kGroup, 0>(v, columns, a[b][0]);
    decode_fragment<kKind, 2 * kGroup, 1>(v, columns, a[b][1]);
    decode_fragment<kKind, 2 * kGroup + 1, 0>(v, columns, a[b][2]);
    decode_fragment<kKind, 2 * kGroup + 1, 1>(v, columns, a[b][3]);
    if constexpr (is_ccq(kKind)) {
      local_scales<kGroup>(product.stage.scale[b], columns.constants, scale[b]);
    }
  }
  if constexpr (kKind != Kind::kDense) {
    if (more) product.template load<kGroup>(w);
  }
#pragma unroll
  for (int j = 0; j < WideShape<kKind, kTokens>::kTokenTiles; j += kPair) {
    uint4 v[kPair][2];
#pragma unroll
    for (int i = 0; i < kPair; ++i) {
      const int row = 8 * (j + i) + g;
#pragma unroll
      for (int h = 0; h < 2; ++h) v[i][h] = x[row * 16 + swizzle(g, 8 * kGroup + 4 * h + c)];
    }
    wide_pair<kKind, kTokens>(product, a, v, scale, offsets + kGroup * (kTokens / 2) + 4 * j + c,
                              j);
  }
  if constexpr (kKind == Kind::kDense) {
    if (more) product.template load<kGroup>(w);
  }
}

/// Grid: column blocks, row tiles, and 1 or `parts`: then each block writes the sums of one part to
/// `p.partial` and finish_parts() does the rest.
template <Kind kKind, bool kGated, int kTokens>
__global__ void __launch_bounds__(kWideThreads, WideShape<kKind, kTokens>::kResident)
    wide_gemm(const TiledWeight w, const GemmParams p, int parts) {
  using Shape = WideShape<kKind, kTokens>;
  // column blocks of the output
  constexpr int kHere = kWideWarps * kWideBlocks / (kGated ? 2 : 1);
  extern __shared__ uint4 shared[];
  __shared__ __align__(16) uint32_t source_rows[kTokens];
  float4* offsets = reinterpret_cast<float4*>(shared + kWideStages * Shape::kStageVectors);

  wait_for_inputs();
  const RowTile tile = find_tile(p.rows, blockIdx.y, kTokens);
  if (tile.count <= 0) return;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int out_tiles = kGated ? w.n_tiles / 2 : w.n_tiles;
  const int first_part = gridDim.z == 1 ? 0 : blockIdx.z;
  const int end_part = gridDim.z == 1 ? parts : blockIdx.z + 1;
  int k_tile = part_begin(w, first_part, parts);
  const int end = part_begin(w, end_part, parts);

  const XCopies<kTokens> copies(w, p, tile, source_rows);
  WideProduct<kKind, kTokens> product;
#pragma unroll
  for (int b = 0; b < kWideBlocks; ++b) {
    // GATED: the block's first half are gate columns, the second the up columns that belong to them
    const int at = b * kWideWarps + warp;
    const int here = min(static_cast<int>(blockIdx.x) * kHere + at % kHere, out_tiles - 1);
    product.start(w, b, int64_t{tile.expert} * w.n_tiles + at / kHere * out_tiles + here, k_tile);
  }
  product.template load<0>(w);
  product.template load<1>(w);
  __syncthreads();
  auto stage_of = [&](int k) { return shared + k % kWideStages * Shape::kStageVectors; };
  auto offsets_of = [&](int k) { return offsets + k % 2 * kTokens; };
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (k_tile + i < end) copies.request(stage_of(k_tile + i), k_tile + i);
    copy_commit();
  }
  TileOffsets<kTokens> ahead;
  if constexpr (is_ccq(kKind)) {
    copy_wait<1>();
    __syncthreads();
    ahead.compute(stage_of(k_tile));
    ahead.store(offsets_of(k_tile));
  }

  PartSums<product.kSums> totals;
  const int zero = static_cast<int>(static_cast<uint32_t>(w.n_tiles) >> 30);
  for (int part = first_part; part < end_part; ++part) {
    if (part > first_part) totals.add(part == first_part + 1, zero, product.acc);
    for (const int part_end = part_begin(w, part + 1, parts); k_tile < part_end; ++k_tile) {
      copy_wait<is_ccq(kKind) ? 0 : 1>();  // CCQ looks at the next tile's x
      __syncthreads();
      if (k_tile + 2 < end) copies.request(stage_of(k_tile + 2), k_tile + 2);
      copy_commit();
      const bool more = k_tile + 1 < end;
      if constexpr (is_ccq(kKind)) ahead.compute(stage_of(k_tile + 1));  // past the end: unused
      wide_group<kKind, kTokens, 0>(product, w, more, stage_of(k_tile), offsets_of(k_tile));
      if constexpr (is_ccq(kKind)) ahead.store(offsets_of(k_tile + 1));
      wide_group<kKind, kTokens, 1>(product, w, more, stage_of(k_tile), offsets_of(k_tile));
    }
  }
  const bool several = end_part > first_part + 1;
  if (several) totals.add(false, zero, product.acc);
  __syncthreads();

  float* staging = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int b = 0; b < kWideBlocks; ++b) {
#pragma unroll
    for (int j = 0; j < Shape::kTokenTiles; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = 8 * j + lane % 4 * 2 + i % 2;
        const int column = (b * kWideWarps + warp) * kTileColumns + lane / 4 + 8 * (i / 2);
        const int at = (b * Shape::kTokenTiles + j) * 4 + i;
        staging[token * kStagingStride + column] =
            several ? totals.sums[at + zero] : product.acc[at];
      }
    }
  }
  __syncthreads();
  constexpr int kOut = kHere * kTileColumns;
  const int64_t first_column = int64_t{tile.expert} * w.n_tiles * kTileColumns;
  for (int i = threadIdx.x; i < tile.count * kOut; i += kWideThreads) {
    const int token = i / kOut, n = i % kOut;
    const int column = blockIdx.x * kOut + n;
    if (column >= p.out_columns) continue;
    const float* row = staging + token * kStagingStride;
    const int target = target_row(p.rows, tile.first + token);
    if (!kGated && gridDim.z > 1) {
      const int64_t part_row = int64_t{blockIdx.z} * p.rows.count + target;
      p.partial[part_row * p.out_columns + column] = row[n];
      continue;
    }
    const float scale = column_scale<kKind>(w, first_column + column);
    const float up_scale =
        kGated ? column_scale<kKind>(w, first_column + out_tiles * kTileColumns + column) : 1.0f;
    const float value = finished<kGated>(row[n], kGated ? row[n + kOut] : 0.0f, scale, up_scale);
    store_output(p, int64_t{target} * p.out_columns + column, value);
  }
}

}  // namespace fd::cuda

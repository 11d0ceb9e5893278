// y = x W for tiled weights: one kernel for a few tokens (a stream of weights), one for many (mma
// tiles). Both serve plain linears and the experts of a MoE layer; GATED fuses silu(x Wg) * (x Wu).
// Here they are launched.
#pragma once

#include "gemm_hopper.h"
#include "gemm_skinny.cuh"
#include "gemm_wide.cuh"

namespace fd::cuda {

constexpr int kSkinnyOverhead =
    3;  // k tiles' worth of time that a warp spends before and after its loop
constexpr int kBusyBlocks = 2;  // blocks an SM needs to hide its latencies

inline int multiprocessor_count() {
  static const int count = [] {
    int device = 0, found = 0;
    check(cudaGetDevice(&device), "gemm: device");
    check(cudaDeviceGetAttribute(&found, cudaDevAttrMultiProcessorCount, device), "gemm: device");
    return found;
  }();
  return count;
}

/// Parts into which K is cut: as many warps share one column block when a single token decodes,
/// chosen for the least time of the busiest SM: its blocks run in rounds of those resident, and a
/// round of few blocks takes as long as one of kBusyBlocks.
///
/// Part of what a product is (see gemm_rows.cuh): it may depend on the weight, the card and
/// `row_tiles`, the tiles of one token (top_k experts, or 1), but on nothing of a step.
inline int canonical_parts(const TiledWeight& w, bool gated, int row_tiles) {
  const int blocks = gated ? w.n_tiles / 2 : w.n_tiles, resident = resident_blocks(gated, 1);
  int best = 1;
  int64_t least = INT64_MAX;
  for (int parts = 1; parts <= kSkinnyWarps && parts <= w.k_tiles; parts *= 2) {
    const int64_t total = int64_t{ceil_div(blocks * parts, kSkinnyWarps)} * row_tiles;
    const int64_t busiest = ceil_div<int64_t>(total, multiprocessor_count());
    const int64_t rest = busiest % resident;
    const int64_t rounds = busiest - rest +
                           (rest == 0            ? 0
                            : rest < kBusyBlocks ? kBusyBlocks
                                                 : rest);
    const int64_t time = rounds * (ceil_div(w.k_tiles, parts) + kSkinnyOverhead);
    if (time < least) {
      least = time;
      best = parts;
    }
  }
  return best;
}

template <Kind kKind, bool kGated, int kTokenTiles>
void launch_skinny(const TiledWeight& w, const GemmParams& p, int row_tiles, cudaStream_t stream) {
  const int blocks = kGated ? w.n_tiles / 2 : w.n_tiles;
  const int parts = canonical_parts(w, kGated, p.tiles_of_token);
  const dim3 grid(ceil_div(blocks, kSkinnyWarps / parts), row_tiles);
  launch("skinny_gemm", skinny_gemm<kKind, kGated, kTokenTiles>, grid, kSkinnyWarps * kWarp, 0,
         stream, w, p, parts);
}

constexpr int kFinishTiles = 2;  // k tiles' worth of time that adding parts takes

/// Whether the parts of K go to blocks of their own: where there are too few row tiles and columns
/// to fill the card. The sums are the same.
inline bool splits_parts(const TiledWeight& w, const GemmParams& p, int blocks, int parts) {
  if (parts == 1 || int64_t{parts} * p.rows.count * p.out_columns > p.partial_floats) return false;
  auto time = [&](int split) {
    return ceil_div(blocks * split, kBusyBlocks * multiprocessor_count()) *
           (ceil_div(w.k_tiles, split) + kSkinnyOverhead);
  };
  return time(parts) + kFinishTiles < time(1);
}

template <Kind kKind, bool kGated, int kTokens>
void launch_wide(const TiledWeight& w, const GemmParams& p, int row_tiles, cudaStream_t stream) {
  constexpr int kBytes = WideShape<kKind, kTokens>::shared_bytes();
  auto kernel = wide_gemm<kKind, kGated, kTokens>;
  static const cudaError_t raised = cudaFuncSetAttribute(
      reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  check(raised, "wide_gemm: shared memory");
  const int columns = ceil_div(w.n_tiles * kTileColumns, kWideColumns);
  const int parts = canonical_parts(w, kGated, p.tiles_of_token);
  const bool split = !kGated && splits_parts(w, p, columns * row_tiles, parts);
  const dim3 grid(columns, row_tiles, split ? parts : 1);
  launch("wide_gemm", kernel, grid, kWideThreads, kBytes, stream, w, p, parts);
  if (split) finish_parts(p, kKind == Kind::kDense ? nullptr : w.column_scale, parts, stream);
}

/// Runs the kernel whose tiles are `tile_rows` rows high: 8 or 16 stream weights, 32, 64 and (not
/// CCQ) 128 work in tiles; kHopperTile is Hopper's.
template <Kind kKind, bool kGated>
void run_gemm(const TiledWeight& w, const GemmParams& p, int tile_rows, int row_tiles,
              cudaStream_t stream) {
  switch (tile_rows) {
    case 8:
      return launch_skinny<kKind, kGated, 1>(w, p, row_tiles, stream);
    case 16:
      return launch_skinny<kKind, kGated, 2>(w, p, row_tiles, stream);
    case 32:
      return launch_wide<kKind, kGated, 32>(w, p, row_tiles, stream);
    case 64:
      return launch_wide<kKind, kGated, 64>(w, p, row_tiles, stream);
    case 128:
      if constexpr (!is_ccq(kKind)) return launch_wide<kKind, kGated, 128>(w, p, row_tiles, stream);
      break;
    case kHopperTile:
      if (kGated || p.rows.tiles != nullptr || p.rows.expert_of_row != nullptr) break;
      if (!hopper_serves(kKind, w, p.partial_floats)) break;
      return gemm_hopper(kKind, w, p, canonical_parts(w, kGated, p.tiles_of_token), stream);
  }
  throw std::runtime_error("gemm: no kernel for row tiles of " + std::to_string(tile_rows));
}

}  // namespace fd::cuda

// y = x W for tiled weights: one kernel for a few tokens (a stream of weights), one for many (mma
// tiles). Both serve plain linears and the experts of a MoE layer; GATED fuses silu(x Wg) * (x Wu).
// Here they are launched.
#pragma once

#include "gemm/experts.h"
#include "gemm/plan_linear.h"
#include "gemm_hopper.h"
#include "gemm_skinny.cuh"
#include "gemm_wide.cuh"

namespace fd::cuda {

inline int parts_of(const TiledWeight& w, bool gated, const GemmParams& p) {
  return canonical_parts({w.n_tiles, w.k_tiles, gated, p.tiles_of_token},
                         card_facts().multiprocessors);
}

template <Kind kKind, bool kGated, int kTokenTiles>
void launch_skinny(const TiledWeight& w, const GemmParams& p, int row_tiles, cudaStream_t stream) {
  const int blocks = kGated ? w.n_tiles / 2 : w.n_tiles;
  const int parts = parts_of(w, kGated, p);
  const dim3 grid(ceil_div(blocks, kSkinnyWarps / parts), row_tiles);
  launch("skinny_gemm", skinny_gemm<kKind, kGated, kTokenTiles>, grid, kSkinnyWarps * kWarp, 0,
         stream, w, p, parts);
}

template <Kind kKind, bool kGated, int kTokens>
void launch_wide(const TiledWeight& w, const GemmParams& p, int row_tiles, cudaStream_t stream) {
  constexpr int kBytes = WideShape<kKind, kTokens>::shared_bytes();
  auto kernel = wide_gemm<kKind, kGated, kTokens>;
  static const cudaError_t raised = cudaFuncSetAttribute(
      reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  check(raised, "wide_gemm: shared memory");
  const int columns = ceil_div(w.n_tiles * kTileColumns, kWideColumns);
  const int parts = parts_of(w, kGated, p);
  const bool split =
      !kGated && splits_parts({p.rows.count, p.out_columns, w.k_tiles, parts}, columns * row_tiles,
                              p.partial_floats, card_facts().multiprocessors);
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
      return gemm_hopper(kKind, w, p, parts_of(w, kGated, p), stream);
  }
  throw std::runtime_error("gemm: no kernel for row tiles of " + std::to_string(tile_rows));
}

}  // namespace fd::cuda

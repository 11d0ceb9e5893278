// The product of many rows on compute capability 9.0: its job and entry points, free of device
// code.
#pragma once

#include "gemm.h"
#include "gemm/plan_linear.h"
#include "weight_tiles.cuh"

namespace fd::cuda {

/// Rows of x as order_rows() left them, in `tiles` tiles of `height` rows, the last one lower; 128
/// columns are one of `groups`. K has `parts`, in `runs` of equal number: more than one if blocks
/// share them, which then leave their sums in p.partial.
struct HopperJob {
  TiledWeight w;
  GemmParams p;
  const uint8_t* x;
  int rows, height, tiles, groups, parts, runs;
  int arrivals;  // of a warp at a barrier: see warp_arrive()

  __host__ __device__ int items() const { return tiles * groups * runs; }
};

/// Whether this card and this build have it for a plain linear, and the scratch has room for a
/// tile.
bool hopper_serves(Kind kind, const TiledWeight& weight, int64_t scratch_floats);

/// See gemm(); in slices of rows where the scratch has no room for all.
void gemm_hopper(Kind kind, const TiledWeight& weight, const GemmParams& params, int parts,
                 cudaStream_t stream);

template <Kind kKind>
void launch_hopper(const HopperJob& job, int multiprocessors, cudaStream_t stream);

}  // namespace fd::cuda

// What the two kernels of y = x W share: the rows they work on, and the one product they compute.
//
// Both compute the same canonical product, so that a row's result depends on the row and the weight
// alone, never on the rows beside it or on the kernel that a step happens to choose:
//  * K is cut into canonical_parts() contiguous parts of whole k tiles, a constant of the weight; a
//    part is one chain of mma k-steps from 0, and the parts' sums are added from first to last.
//  * CCQ: each 64-row group is a chain of its own: four k-steps of -160 times x, then the four of
//    128 + field; a part adds up fma(local scale, group, sum) over its groups.
//  * The total times the column scale (and SwiGLU) is rounded by finished().
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

__device__ __forceinline__ float silu(float x) { return __fdiv_rn(x, __fadd_rn(1.0f, __expf(-x))); }

/// The output from the sums of one column (GATED: of a gate column and its up column). Every
/// rounding is spelled out: the kernels must not differ in what the compiler fuses.
template <bool kGated>
__device__ __forceinline__ float finished(float sum, float up_sum, float scale, float up_scale) {
  const float value = __fmul_rn(sum, scale);
  return kGated ? __fmul_rn(silu(value), __fmul_rn(up_sum, up_scale)) : value;
}

__host__ __device__ __forceinline__ int part_begin(const TiledWeight& w, int part, int parts) {
  return part_begin(w.k_tiles, part, parts);
}

template <Kind kKind>
__device__ __forceinline__ float column_scale(const TiledWeight& w, int64_t column) {
  return kKind == Kind::kDense ? 1.0f : w.column_scale[column];
}

__device__ __forceinline__ void store_output(const GemmParams& p, int64_t index, float value) {
  if (p.out_float != nullptr) {
    p.out_float[index] = value;
  } else {
    p.out[index] = __float2bfloat16_rn(value);
  }
}

/// -160 times the sum over a group's x for each token of kTokenTiles tiles, the same in all
/// columns: begins the chains of CCQ. The idle tensor core takes off the offset of the fields
/// cheaper than the busy ALUs would.
template <int kTokenTiles>
__device__ __forceinline__ void group_offsets(const uint32_t (&offset)[4],
                                              const uint4 (&x)[kTokenTiles][2],
                                              float (&sums)[kTokenTiles][4]) {
#pragma unroll
  for (int j = 0; j < kTokenTiles; ++j) mma_first(sums[j], offset, x[j][0].x, x[j][0].y);
#pragma unroll
  for (int j = 0; j < kTokenTiles; ++j) mma(sums[j], offset, x[j][0].z, x[j][0].w);
#pragma unroll
  for (int j = 0; j < kTokenTiles; ++j) mma(sums[j], offset, x[j][1].x, x[j][1].y);
#pragma unroll
  for (int j = 0; j < kTokenTiles; ++j) mma(sums[j], offset, x[j][1].z, x[j][1].w);
}

}  // namespace fd::cuda

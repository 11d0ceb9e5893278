// Brings rows of x into wgmma's order and launches Hopper's product over them.
#include <algorithm>

#include "common.cuh"
#include "gemm/experts.h"
#include "gemm/jobs.cuh"
#include "gemm_hopper.h"

namespace fd::cuda {
namespace {

constexpr int kOrderThreads = 256;

/// Rows of x, padded to whole k tiles with zeros, tile after tile of `height` rows: 64 rows of K of
/// a tile are one piece, [row][128 bytes] in wgmma's 128-byte swizzle. Every 32 elements stand in
/// the order in which k-steps take them, see weight_tiles.cuh. A thread moves 32 elements.
__global__ void __launch_bounds__(kOrderThreads)
    order_kernel(const bf16* x, int rows, int width, int padded, int height, uint8_t* out) {
  const int of_row = padded / 32;
  const int64_t index = int64_t{blockIdx.x} * kOrderThreads + threadIdx.x;
  const int row = static_cast<int>(index / of_row), chunk = static_cast<int>(index % of_row);
  if (row >= rows) return;
  uint4 v[4];
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    const int k = chunk * 32 + c * 8;
    v[c] = k < width ? __ldg(reinterpret_cast<const uint4*>(x + int64_t{row} * width + k))
                     : make_uint4(0, 0, 0, 0);
  }
  const uint4 steps[4] = {{v[0].x, v[1].x, v[2].x, v[3].x},
                          {v[0].y, v[1].y, v[2].y, v[3].y},
                          {v[0].z, v[1].z, v[2].z, v[3].z},
                          {v[0].w, v[1].w, v[2].w, v[3].w}};
  const int first = row / height * height, here = min(height, rows - first);
  uint8_t* const to = out + int64_t{first} * padded * 2;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int64_t at = tiled_byte(here, row - first, chunk * 64 + j * 16);
    *reinterpret_cast<uint4*>(to + at) = steps[j];
  }
}

void order_rows(const HopperJob& job, cudaStream_t stream) {
  const int padded = job.w.k_tiles * kTileRows;
  const int64_t moves = int64_t{job.rows} * (padded / 32);
  order_kernel<<<static_cast<unsigned>(ceil_div<int64_t>(moves, kOrderThreads)), kOrderThreads, 0,
                 stream>>>(job.p.x, job.rows, job.w.in_features, padded, job.height,
                           const_cast<uint8_t*>(job.x));
  check_launch("order_rows");
}

}  // namespace

bool hopper_serves(Kind kind, const TiledWeight& w, int64_t scratch_floats) {
  return hopper_serves({0, kind, w.in_features, w.out_features, scratch_floats}, card_facts());
}

void gemm_hopper(Kind kind, const TiledWeight& w, const GemmParams& p, int parts,
                 cudaStream_t stream) {
  const int padded = w.k_tiles * kTileRows, all = p.rows.count;
  const int multiprocessors = card_facts().multiprocessors;
  const int room = hopper_rows(all, w.k_tiles, p.partial_floats);
  for (int first = 0; first < all;) {
    HopperJob job{w, p, reinterpret_cast<const uint8_t*>(p.partial)};
    job.rows = std::min(room, all - first);
    job.groups = ceil_div(p.out_columns, kHopperColumns);
    job.parts = parts;
    job.arrivals = warp_arrivals();
    job.p.x += int64_t{first} * w.in_features;
    if (p.out != nullptr) job.p.out += int64_t{first} * p.out_columns;
    if (p.out_float != nullptr) job.p.out_float += int64_t{first} * p.out_columns;
    const int64_t x_floats = int64_t{job.rows} * padded / 2;
    job.p.partial += x_floats;
    job.p.partial_floats -= x_floats;
    job.p.rows.count = job.rows;
    const HopperCut cut = hopper_cut({job.rows, p.out_columns, w.k_tiles, parts},
                                     job.p.partial_floats, multiprocessors);
    job.height = cut.height;
    job.tiles = cut.tiles;
    job.runs = cut.runs;
    order_rows(job, stream);
    if (kind == Kind::kInt8) {
      launch_hopper<Kind::kInt8>(job, multiprocessors, stream);
    } else {
      launch_hopper<Kind::kInt4>(job, multiprocessors, stream);
    }
    if (job.runs > 1) finish_parts(job.p, w.column_scale, parts, stream);
    first += job.rows;
  }
}

}  // namespace fd::cuda

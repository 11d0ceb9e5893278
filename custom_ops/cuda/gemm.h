// Matrix products with tiled weights: parameters and entry points, free of device code.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace fd::cuda {

struct TiledWeight;

/// Which rows of x a product reads and which rows of its output it writes.
///
/// Plain linear: only `count`. MoE: rows are (token, slot) pairs sorted by expert; `slot_of_row`
/// maps a sorted row to slot index token * top_k + j, `tiles` lists {expert, first sorted row,
/// rows, 0} of equal expert. With few tokens no sorting is done: `expert_of_row` gives each row its
/// own tile.
struct GemmRows {
  int count = 0;
  const int4* tiles = nullptr;
  const int* expert_of_row = nullptr;
  const int* slot_of_row = nullptr;
  bool gather = false;     // row of x is slot / source_divisor instead of the sorted row
  int source_divisor = 1;  // top_k when x holds one row per token
  bool scatter = false;    // row of the output is the slot instead of the sorted row
};

struct GemmParams {
  const __nv_bfloat16* x = nullptr;
  __nv_bfloat16* out = nullptr;  // exactly one of out, out_float
  float* out_float = nullptr;
  int out_columns = 0;
  GemmRows rows;
};

/// `kind`: value of enum Kind. `tile_rows`: rows of x per tile, 64 or 128 for the tile kernel
/// (`wide`), 8, 16, 32 or (not gated) 64 for the one that streams weights; `row_tiles`: number of
/// tiles.
void gemm(int kind, bool gated, const TiledWeight& weight, const GemmParams& params, bool wide,
          int tile_rows, int row_tiles, cudaStream_t stream);

}  // namespace fd::cuda

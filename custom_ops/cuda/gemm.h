// Matrix products with tiled weights: parameters and entry points, free of device code.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace fd::cuda {

struct TiledWeight;

constexpr int kHopperTile = 256;  // stands for Hopper's kernel, which cuts rows by itself

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
  float* partial =
      nullptr;  // scratch where products of few tiles may share out K; plain linear only
  int64_t partial_floats = 0;
  int out_columns = 0;
  int tiles_of_token = 1;  // top_k experts; a constant of the model, see canonical_parts()
  GemmRows rows;
};

/// `kind`: value of enum Kind. `tile_rows`: rows of x per tile, 8 or 16 for the kernel that streams
/// weights, 32, 64 or (not CCQ) 128 for the tile kernel, kHopperTile for Hopper's, which needs
/// params.partial; `row_tiles`: number of tiles. Neither, nor the other rows, changes a bit of a
/// row's result.
void gemm(int kind, bool gated, const TiledWeight& weight, const GemmParams& params, int tile_rows,
          int row_tiles, cudaStream_t stream);

/// Adds `parts` partial results in order and finishes the output.
void finish_parts(const GemmParams& params, const float* column_scale, int parts,
                  cudaStream_t stream);

/// One call of bf16 experts, see ops.fused_moe. `inner` [slots, I] and `outputs` [slots, H] are
/// scratch; `slot_of_row` [slots] and `tiles` [max_tiles] too, not used when `tile_rows` is 0: then
/// every slot is a tile of its own.
struct DenseExperts {
  const __nv_bfloat16* x;
  const int* ids;
  const float* route_weights;
  const TiledWeight& up_gate;
  const TiledWeight& down;
  int experts;
  __nv_bfloat16* inner;
  __nv_bfloat16* outputs;
  int* slot_of_row;
  int4* tiles;
  __nv_bfloat16* out;
  int tokens;
  int top_k;
  int tile_rows;
  int max_tiles;
};
void dense_experts(const DenseExperts& call, cudaStream_t stream);

}  // namespace fd::cuda

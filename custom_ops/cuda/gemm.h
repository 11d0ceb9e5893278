// Matrix products with tiled weights: parameters and entry points, free of device code.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "gemm/linear_shape.h"
#include "gemm/plan_moe.h"

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

/// One call of bf16 experts, see ops.fused_moe.
struct DenseExperts {
  const __nv_bfloat16* x;
  const int* ids;
  const float* route_weights;
  const TiledWeight& up_gate;
  const TiledWeight& down;
  int experts;
  __nv_bfloat16* out;
  int tokens;
  int top_k;
};

/// Bytes of scratch on the card that a call with so many slots, tokens times top_k, takes.
int64_t dense_experts_bytes(const DenseExpertsPlan& plan, int slots, int hidden, int inner);
void dense_experts(const DenseExpertsPlan& plan, const DenseExperts& call, void* memory,
                   cudaStream_t stream);

}  // namespace fd::cuda

// The experts of a MoE layer in bf16: sort by expert, gate and up with SwiGLU, down, combine.
#include "gemm.h"
#include "ops.h"
#include "weight_tiles.cuh"

namespace fd::cuda {

void dense_experts(const DenseExperts& call, cudaStream_t stream) {
  const int slots = call.tokens * call.top_k, kind = static_cast<int>(Kind::kDense);
  const bool direct = call.tile_rows == 0;
  const int height = direct ? 8 : call.tile_rows;
  const int row_tiles = direct ? slots : call.max_tiles;
  GemmRows rows;
  rows.count = slots;
  rows.gather = true;
  rows.source_divisor = call.top_k;
  if (direct) {
    rows.expert_of_row = call.ids;
  } else {
    align_experts(call.ids, slots, call.experts, call.tile_rows, call.max_tiles, call.slot_of_row,
                  call.tiles, stream);
    rows.tiles = call.tiles;
    rows.slot_of_row = call.slot_of_row;
  }
  GemmParams up;
  up.x = call.x;
  up.out = call.inner;
  up.out_columns = call.up_gate.out_features / 2;
  up.rows = rows;
  up.tiles_of_token = call.top_k;
  gemm(kind, true, call.up_gate, up, height, row_tiles, stream);
  GemmParams lower;
  lower.x = call.inner;
  lower.out = call.outputs;
  lower.out_columns = call.down.out_features;
  lower.rows = rows;
  lower.rows.gather = false;
  lower.rows.scatter = true;
  lower.tiles_of_token = call.top_k;
  gemm(kind, false, call.down, lower, height, row_tiles, stream);
  combine(call.outputs, call.route_weights, call.out, call.tokens, call.top_k,
          call.down.out_features, stream);
}

}  // namespace fd::cuda

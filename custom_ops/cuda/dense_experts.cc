// The experts of a MoE layer in bf16: sort by expert, gate and up with SwiGLU, down, combine.
#include "gemm.h"
#include "ops.h"
#include "pieces.h"
#include "weight_tiles.cuh"

namespace fd::cuda {
namespace {

constexpr int kLowestTile = 8;

struct Memory {
  bf16* inner;       // [slots][I]
  bf16* outputs;     // [slots][H]
  int* slot_of_row;  // [slots]; as the tiles not used where nothing is sorted
  int4* tiles;       // [max_tiles]
  int64_t bytes;

  Memory(void* memory, const DenseExpertsPlan& plan, int slots, int hidden, int inner_width) {
    Pieces pieces(memory);
    inner = pieces.take<bf16>(int64_t{slots} * inner_width);
    outputs = pieces.take<bf16>(int64_t{slots} * hidden);
    slot_of_row = pieces.take<int>(slots);
    tiles = pieces.take<int4>(plan.max_tiles);
    bytes = pieces.used();
  }
};

}  // namespace

int64_t dense_experts_bytes(const DenseExpertsPlan& plan, int slots, int hidden, int inner) {
  return Memory(nullptr, plan, slots, hidden, inner).bytes;
}

void dense_experts(const DenseExpertsPlan& plan, const DenseExperts& call, void* memory,
                   cudaStream_t stream) {
  const int slots = call.tokens * call.top_k, kind = static_cast<int>(Kind::kDense);
  const Memory m(memory, plan, slots, call.down.out_features, call.down.in_features);
  const bool direct = plan.tile_rows == 0;
  const int height = direct ? kLowestTile : plan.tile_rows;
  GemmRows rows;
  rows.count = slots;
  rows.gather = true;
  rows.source_divisor = call.top_k;
  if (direct) {
    rows.expert_of_row = call.ids;
  } else {
    align_experts(call.ids, slots, call.experts, plan.tile_rows, plan.max_tiles, m.slot_of_row,
                  m.tiles, stream);
    rows.tiles = m.tiles;
    rows.slot_of_row = m.slot_of_row;
  }
  GemmParams up;
  up.x = call.x;
  up.out = m.inner;
  up.out_columns = call.up_gate.out_features / 2;
  up.rows = rows;
  up.tiles_of_token = call.top_k;
  gemm(kind, true, call.up_gate, up, height, plan.max_tiles, stream);
  GemmParams lower;
  lower.x = m.inner;
  lower.out = m.outputs;
  lower.out_columns = call.down.out_features;
  lower.rows = rows;
  lower.rows.gather = false;
  lower.rows.scatter = true;
  lower.tiles_of_token = call.top_k;
  gemm(kind, false, call.down, lower, height, plan.max_tiles, stream);
  combine(m.outputs, call.route_weights, call.out, call.tokens, call.top_k, call.down.out_features,
          stream);
}

}  // namespace fd::cuda

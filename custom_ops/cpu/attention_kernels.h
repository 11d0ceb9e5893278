// The attention kernel that each instruction set provides (cpu/isa/attention.cc).
#pragma once

#include <cstdint>

#include "cpu_features.h"

namespace fd {

constexpr int kBlockTokens = 64;      // tokens of a KV block
constexpr int kMaxTileRows = 64;      // query rows (tokens x heads of one KV head) of a tile
constexpr int kMaxHeadDim = 512;      // bounds the scratch of a thread
constexpr int kPartitionBlocks = 16;  // KV blocks whose softmax runs before it is merged

// Query rows that share one KV head, and where their keys lie. Row r belongs to the token
// r / heads_per_token of the tile, whose position is first_position + r / heads_per_token.
struct AttentionTile {
  const float* query;  // [rows, head_dim], already multiplied by the softmax scale
  int rows;
  int heads_per_token;
  int64_t first_position;
  int head_dim;
  const float* key_cache;  // of the KV head: block b begins at b * block_stride, [64, head_dim]
  const float* value_cache;
  int64_t block_stride;
  const int32_t* block_table;
};

// Softmax state of a tile: sum of e^(score - max) and of e^(score - max) * value. `max` of a row
// that has seen no key is -inf.
struct AttentionState {
  float* max;  // [rows]
  float* sum;  // [rows]
  float* acc;  // [rows, head_dim]
};

struct AttentionKernels {
  // State of the keys of the blocks [first_block, last_block). `scratch`:
  // attention_scratch_floats().
  void (*attend)(const AttentionTile& tile, int first_block, int last_block,
                 const AttentionState& state, float* scratch);
  // into += from, row by row; rows of `from` without keys change nothing.
  void (*merge)(const AttentionState& into, const AttentionState& from, int rows, int head_dim);
  // out[r] = acc[r] / sum[r]
  void (*finish)(const AttentionState& state, int rows, int head_dim, float* out);
};

// Transposed keys, then scores.
inline int64_t attention_scratch_floats(int head_dim) {
  return static_cast<int64_t>(head_dim) * kBlockTokens + kMaxTileRows * kBlockTokens;
}

FD_DECLARE_KERNELS(AttentionKernels, attention_kernels);

}  // namespace fd

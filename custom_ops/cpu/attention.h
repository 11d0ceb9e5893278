// Rotary embedding with the write into the paged KV cache, and attention over that cache (CPU).
#pragma once

#include <cstdint>

namespace fd::cpu {

// Caches are [num_blocks, kv_heads, 64, head_dim]; a slot is block * 64 + offset.
struct CacheShape {
  int64_t num_blocks;
  int kv_heads;
  int head_dim;
};

struct RopeArguments {
  const float* qkv;  // [tokens, (query_heads + 2 kv_heads) * head_dim]
  const int32_t* positions;
  const float* cos_sin;  // [max_positions, head_dim]: cosines, then sines
  int64_t max_positions;
  const int32_t* slots;  // -1: the token's key and value are not kept
  float* key_cache;
  float* value_cache;
  CacheShape cache;
  float* query_out;  // [tokens, query_heads * head_dim]
  int64_t tokens;
  int query_heads;
};

// Throws std::invalid_argument for a position or slot out of range.
void rope_and_cache(const RopeArguments& args);

struct AttentionArguments {
  const float* query;  // [tokens, query_heads * head_dim]
  const float* key_cache;
  const float* value_cache;
  CacheShape cache;
  const int32_t* block_tables;  // [sequences, max_blocks]
  int64_t max_blocks;
  const int32_t* first_token;     // [sequences + 1], cumulative
  const int32_t* context_length;  // [sequences], this step's tokens included
  int64_t sequences;
  int64_t tokens;
  int query_heads;
  float scale;
  float* out;  // [tokens, query_heads * head_dim]
};

// Throws std::invalid_argument for lengths that contradict each other and blocks out of range.
void paged_attention(const AttentionArguments& args);

}  // namespace fd::cpu

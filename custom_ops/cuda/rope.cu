// Rotary embedding of queries and keys with the write into the paged cache.
//
// Keys lie as [block][kv head][64 tokens][D], values transposed as [block][kv head][D][64 tokens],
// as attention.cu reads them.
#include "attention.cuh"

namespace fd::cuda {
namespace {

/// One thread a pair of features of one head of one token: rotate q and k, copy v.
__global__ void rope_kernel(const bf16* qkv, const int* positions, const float* cos_sin,
                            const int* slot_mapping, bf16* key_cache, bf16* value_cache,
                            bf16* q_out, AttentionShape shape, int max_positions) {
  wait_for_inputs();
  const int token = blockIdx.x;
  const int half_dim = shape.head_dim / 2;
  const int heads = shape.query_heads + 2 * shape.kv_heads;
  const int position = min(max(positions[token], 0), max_positions - 1);
  const int slot = slot_mapping[token];
  const bool cached = slot >= 0 && slot / kBlockTokens < shape.num_blocks;
  const uint32_t* from = reinterpret_cast<const uint32_t*>(qkv) + int64_t{token} * heads * half_dim;
  const float* table = cos_sin + int64_t{position} * shape.head_dim;
  for (int i = blockIdx.y * blockDim.x + threadIdx.x; i < heads * half_dim;
       i += gridDim.y * blockDim.x) {
    const int head = i / half_dim, pair = i % half_dim;
    const int kv_head = (head - shape.query_heads) % shape.kv_heads;
    const int64_t block =
        (int64_t{slot / kBlockTokens} * shape.kv_heads + kv_head) * kBlockTokens * shape.head_dim;
    if (head >= shape.query_heads + shape.kv_heads) {
      if (!cached) continue;
      bf16* to = value_cache + block + int64_t{2 * pair} * kBlockTokens + slot % kBlockTokens;
      const __nv_bfloat162 x = *reinterpret_cast<const __nv_bfloat162*>(from + i);
      to[0] = x.x;
      to[kBlockTokens] = x.y;
      continue;
    }
    const float cosine = table[pair], sine = table[half_dim + pair];
    const uint32_t rotated = turned_pair(from[i], cosine, sine);
    if (head < shape.query_heads) {
      reinterpret_cast<uint32_t*>(q_out)[int64_t{token} * shape.query_heads * half_dim + i] =
          rotated;
    } else if (cached) {
      const int64_t row = block + int64_t{slot % kBlockTokens} * shape.head_dim;
      *reinterpret_cast<uint32_t*>(key_cache + row + 2 * pair) = rotated;
    }
  }
}

}  // namespace

void rope_and_cache(const bf16* qkv, const int* positions, const float* cos_sin,
                    const int* slot_mapping, bf16* key_cache, bf16* value_cache, bf16* q_out,
                    const AttentionShape& shape, int max_positions, cudaStream_t stream) {
  constexpr int kThreads = 256;
  const int pairs = (shape.query_heads + 2 * shape.kv_heads) * shape.head_dim / 2;
  const dim3 grid(shape.tokens, ceil_div(pairs, 2 * kThreads));
  launch("rope_and_cache", rope_kernel, grid, kThreads, 0, stream, qkv, positions, cos_sin,
         slot_mapping, key_cache, value_cache, q_out, shape, max_positions);
}

}  // namespace fd::cuda

// Causal attention over the paged cache: which launches a step takes.
//
// Keys lie as [block][kv head][64 tokens][D], values transposed as [block][kv head][D][64 tokens]:
// both operands of mma.m16n8k16 then come as 16-byte reads of what the cache holds.
#include <algorithm>

#include "attention.cuh"
#include "gemm/experts.h"

namespace fd::cuda {
namespace {

/// The sequences from `first` on.
AttentionParams slice(AttentionParams p, int first, int count) {
  p.block_tables += int64_t{first} * p.table_width;
  p.cu_seqlens_q += first;
  p.context_lens += first;  // tokens keep their numbers, see cu_seqlens_q
  p.sequences = count;
  return p;
}

template <int kDim>
void launch_chunks(const AttentionParams& p, const AttentionShape& shape, cudaStream_t stream) {
  if (chunks_on_wgmma(shape, card_facts())) {
    launch_prefill_sm90(p, shape.num_blocks, shape.tokens, stream);
  } else {
    launch_prefill<kDim>(p, shape.tokens, stream);
  }
}

template <int kDim>
void launch_attention(const AttentionParams& p, const AttentionPlan& plan,
                      const AttentionShape& shape, cudaStream_t stream) {
  const int sequences = p.sequences;
  if (takes_chunks(shape)) {
    for (int b = 0; b < sequences; b += kMaxListed) {
      launch_chunks<kDim>(slice(p, b, std::min(kMaxListed, sequences - b)), shape, stream);
    }
  }
  if (!decodes(shape)) return;
  for (int b = 0; b < sequences; b += plan.sequences) {
    launch_decode<kDim>(slice(p, b, std::min(plan.sequences, sequences - b)), plan.blocks, stream);
  }
}

}  // namespace

int64_t attention_counter_bytes() { return sizeof(AttentionCounters); }

namespace {

void attend(const bf16* q, const NewTokens& fresh, const bf16* key_cache, const bf16* value_cache,
            const int* block_tables, const int* cu_seqlens_q, const int* context_lens, float scale,
            const AttentionPlan& plan, const AttentionScratch& scratch, bf16* out,
            const AttentionShape& shape, cudaStream_t stream) {
  constexpr float kLog2e = 1.4426950408889634f;
  if (!(scale > 0.0f)) {
    throw std::runtime_error("paged_attention: the scale is " + std::to_string(scale) +
                             ", expected a positive number");
  }
  const AttentionParams p{q,
                          key_cache,
                          value_cache,
                          block_tables,
                          cu_seqlens_q,
                          context_lens,
                          scratch.partial,
                          static_cast<AttentionCounters*>(scratch.counters),
                          out,
                          scale * kLog2e,
                          shape.query_heads,
                          shape.kv_heads,
                          shape.group(),
                          shape.table_width,
                          most_segments(shape.table_width),
                          shape.sequences,
                          true,
                          fresh};
  switch (shape.head_dim) {
    case 32:
      return launch_attention<32>(p, plan, shape, stream);
    case 64:
      return launch_attention<64>(p, plan, shape, stream);
    case 128:
      return launch_attention<128>(p, plan, shape, stream);
    default:
      throw std::runtime_error("paged_attention: head_dim " + std::to_string(shape.head_dim) +
                               " is not supported, expected 32, 64 or 128");
  }
}

}  // namespace

void paged_attention(const bf16* q, const bf16* key_cache, const bf16* value_cache,
                     const int* block_tables, const int* cu_seqlens_q, const int* context_lens,
                     float scale, const AttentionPlan& plan, const AttentionScratch& scratch,
                     bf16* out, const AttentionShape& shape, cudaStream_t stream) {
  attend(q, {}, key_cache, value_cache, block_tables, cu_seqlens_q, context_lens, scale, plan,
         scratch, out, shape, stream);
}

void decode_new_tokens(const bf16* qkv, const int* positions, const float* cos_sin,
                       const int* slot_mapping, bf16* key_cache, bf16* value_cache,
                       const int* block_tables, const int* cu_seqlens_q, const int* context_lens,
                       float scale, const AttentionPlan& plan, const AttentionScratch& scratch,
                       bf16* out, const AttentionShape& shape, int max_positions,
                       cudaStream_t stream) {
  if (!decodes_in_one(shape, plan)) {
    rope_and_cache(qkv, positions, cos_sin, slot_mapping, key_cache, value_cache, out, shape,
                   max_positions, stream);
    return paged_attention(out, key_cache, value_cache, block_tables, cu_seqlens_q, context_lens,
                           scale, plan, scratch, out, shape, stream);
  }
  const NewTokens fresh{qkv,       positions,   cos_sin,       slot_mapping,
                        key_cache, value_cache, max_positions, shape.num_blocks};
  attend(nullptr, fresh, key_cache, value_cache, block_tables, cu_seqlens_q, context_lens, scale,
         plan, scratch, out, shape, stream);
}

}  // namespace fd::cuda

// Every CUDA op: raw device pointers in, results in memory that the caller owns, work queued on
// `stream`. Nothing here allocates device memory or waits for the device (but for upload's pinned
// ring), so every op may be captured into a CUDA graph. Shapes are contiguous unless a leading
// dimension is passed. Failures throw std::runtime_error.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <string>

#include "gemm/plan_attention.h"
#include "gemm/plan_moe.h"

namespace fd::cuda {

using bf16 = __nv_bfloat16;

// --- elementwise and norms (norm.cu)
// -------------------------------------------------------------------------
/// Rows first .. first + vocab - 1 of a table; other ids give zeros.
void embedding(const int* ids, const bf16* table, bf16* out, int tokens, int hidden, int first,
               int vocab, cudaStream_t stream);
/// weight is float32 or bf16 [hidden]. With `residual`, residual += x (or x + y) first and the sum
/// is normalised; each sum is rounded to bf16.
void rms_norm(const bf16* x, const bf16* y, bf16* residual, const void* weight,
              bool weight_is_float, float eps, bf16* out, int tokens, int hidden,
              cudaStream_t stream);
void silu_and_mul(const bf16* x, bf16* out, int tokens, int width, cudaStream_t stream);
void add_inplace(bf16* x, const bf16* y, int64_t count, cudaStream_t stream);
/// Copies rows of `row_bytes` (a multiple of 2) by index; rows out of [0, source_rows) become
/// zeros.
void gather_rows(const void* x, const int* rows, void* out, int count, int64_t row_bytes,
                 int source_rows, cudaStream_t stream);

// --- weights (pack.cu)
// ---------------------------------------------------------------------------------------
/// File layout -> tiles, for one expert. `source` lies on the card. Dense: bf16 or float32, [K, N]
/// or [N, K].
void pack_tiles(int kind, const void* source, bool source_is_float, bool transposed, void* tiles,
                int in_features, int out_features, cudaStream_t stream);
void pack_local_scales(const uint8_t* source, void* packed, int in_features, int out_features,
                       cudaStream_t stream);
/// Dense matrix -> bf16 [N, K] row by row.
void pack_rows(const void* source, bool source_is_float, bool transposed, bf16* out,
               int in_features, int out_features, cudaStream_t stream);
/// Decodes one expert with the product kernels' own code: float32 [K, N]; `scaled` multiplies by
/// local and column scales, otherwise the bare integers are written.
void unpack_tiles(int kind, const void* tiles, const void* local_scale, const float* code_scale,
                  const float* code_bias, const float* column_scale, bool scaled, float* out,
                  int in_features, int out_features, cudaStream_t stream);
/// Fills tiles (or bf16 rows, of standard deviation `size`) with valid random codes of the kind.
void randomize(int kind, void* data, int64_t bytes, uint64_t seed, float size, cudaStream_t stream);

// --- mixture of experts (moe.cu)
// -----------------------------------------------------------------------------
/// `partial`: float32 scratch [plan.count, tokens, experts].
void route(const bf16* x, const float* gate, const float* bias, float* partial,
           const RoutePlan& plan, int* ids, float* weights, int tokens, int hidden, int experts,
           int top_k, cudaStream_t stream);
/// Sorts slots by expert into `slot_of_row` [slots] and lists tiles of `tile_rows` rows; the first
/// int4 past the last tile and all after it have count 0. max_tiles >= slots / tile_rows + experts.
void align_experts(const int* ids, int slots, int experts, int tile_rows, int max_tiles,
                   int* slot_of_row, int4* tiles, cudaStream_t stream);
/// out[t] = sum over j of weights[t, j] * y[t * top_k + j], in that order.
void combine(const bf16* y, const float* weights, bf16* out, int tokens, int top_k, int hidden,
             cudaStream_t stream);

// --- attention (rope.cu, attention.cu)
// --------------------------------------------------------------------------------
void rope_and_cache(const bf16* qkv, const int* positions, const float* cos_sin,
                    const int* slot_mapping, bf16* key_cache, bf16* value_cache, bf16* q_out,
                    const AttentionShape& shape, int max_positions, cudaStream_t stream);
/// Memory on the card that one launch at a time may use: a runner's own.
struct AttentionScratch {
  float* partial;  // of the plan's size
  void* counters;  // attention_counter_bytes(), zero when they are made; kernels leave them zero
};
int64_t attention_counter_bytes();
/// A token's result depends on its query and the keys and values up to it alone, bit for bit. A
/// step of as many tokens as sequences is taken for one token each. `out` may be `q`.
void paged_attention(const bf16* q, const bf16* key_cache, const bf16* value_cache,
                     const int* block_tables, const int* cu_seqlens_q, const int* context_lens,
                     float scale, const AttentionPlan& plan, const AttentionScratch& scratch,
                     bf16* out, const AttentionShape& shape, cudaStream_t stream);

/// rope_and_cache, then paged_attention, for one token a sequence: in one kernel where that can be,
/// to the same bits. The cache's entries for the new tokens need not have been written.
void decode_new_tokens(const bf16* qkv, const int* positions, const float* cos_sin,
                       const int* slot_mapping, bf16* key_cache, bf16* value_cache,
                       const int* block_tables, const int* cu_seqlens_q, const int* context_lens,
                       float scale, const AttentionPlan& plan, const AttentionScratch& scratch,
                       bf16* out, const AttentionShape& shape, int max_positions,
                       cudaStream_t stream);

// --- sampling (sampling.cu)
// ----------------------------------------------------------------------------------
void mask_logits(float* logits, const int* bitmask, const int* rows, int count, int vocab,
                 int words, cudaStream_t stream);
void process_logits(float* logits, const int* slots, const int* occurrences,
                    const float* repetition, const float* frequency, const float* presence,
                    const float* temperature, const int* edit_offsets, const int* edit_ids,
                    const float* edit_values, int rows, int vocab, cudaStream_t stream);
void update_occurrences(int* occurrences, const int* slots, const int* ids, int count, bool prompt,
                        int slot_count, int vocab, cudaStream_t stream);
/// A row with NaN, or without a finite logit, gets -1.
void sample(const float* logits, const float* temperature, const int* top_k, const float* top_p,
            const float* min_p, const int64_t* seeds, const int64_t* steps, const int* forced,
            int* out, int rows, int vocab, cudaStream_t stream);
void token_logprobs(const float* logits, const int* tokens, int k, float* out_logprob,
                    int* out_rank, int* out_ids, float* out_logprobs, int rows, int vocab,
                    cudaStream_t stream);
constexpr int kMaxTopLogprobs = 1024;

// --- dense products (blas.cc)
// --------------------------------------------------------------------------------
/// Opens cuBLASLt; an empty path searches the loader's own directories.
void blas_open(const std::string& path);
/// out [tokens, N] = x [tokens, K] * rows [N, K]^T, float32 sums. `workspace` lives on the card.
void dense_linear(const bf16* x, const bf16* rows, void* out, bool out_is_float, int tokens,
                  int in_features, int out_features, void* workspace, int64_t workspace_bytes,
                  cudaStream_t stream);

}  // namespace fd::cuda

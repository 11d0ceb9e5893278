// Rotary embedding with the KV cache write, and causal attention over the paged cache.
//
// Keys lie as [block][kv head][64 tokens][D], values transposed as [block][kv head][D][64 tokens]:
// both operands of mma.m16n8k16 then come as 16-byte loads straight from the cache, without shared
// memory or barriers. The rows of matrix A are (token, query head of one KV group) pairs, so that a
// group reads its keys once.
#include "common.cuh"
#include "ops.h"

namespace fd::cuda {
namespace {

constexpr int kBlockTokens = 64;  // cache block
constexpr int kStepTokens = 32;   // tokens per iteration of a warp
constexpr int kRows = 16;         // rows of one warp
constexpr int kWarps = 4;
constexpr float kLog2e = 1.4426950408889634f;

struct AttentionParams {
  const bf16* q;
  const bf16* key_cache;
  const bf16* value_cache;
  const int* block_tables;
  const int* cu_seqlens_q;
  const int* context_lens;
  float* partial;
  bf16* out;
  float scale_log2;
  int query_heads;
  int kv_heads;
  int group;  // query heads per KV head
  int table_width;
  int splits;
  int sequences;
};

/// Where one sequence's queries lie.
struct Sequence {
  int first;    // first token of this step
  int length;   // tokens of this step
  int context;  // tokens in the cache including this step
};

__device__ __forceinline__ Sequence load_sequence(const AttentionParams& p, int b) {
  const int first = p.cu_seqlens_q[b];
  return {first, p.cu_seqlens_q[b + 1] - first, p.context_lens[b]};
}

/// One warp's 16 query rows with their running softmax.
template <int kDim>
struct WarpState {
  static constexpr int kChunks = kDim / 32;
  static constexpr int kOutTiles = kDim / 8;
  uint32_t q[kChunks][2][4];
  float out[kOutTiles][4];
  float top[2];    // running maximum of the rows lane / 4 and lane / 4 + 8, in log2 units
  float total[2];  // this lane's share of the sum of exponentials
  int last[2];     // last position that the row may see; -1: no such row
};

template <int kDim>
__device__ __forceinline__ void load_queries(WarpState<kDim>& state, const AttentionParams& p,
                                             const Sequence& seq, int kv_head, int first_row) {
  const int lane = threadIdx.x % kWarp, g = lane / 4, c = lane % 4;
  const int rows = seq.length * p.group;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first_row + g + 8 * half;
    const bool valid = row < rows;
    const int token = valid ? row / p.group : 0;
    const int head = kv_head * p.group + (valid ? row % p.group : 0);
    const bf16* from = p.q + (int64_t{seq.first + token} * p.query_heads + head) * kDim + 8 * c;
    state.last[half] = valid ? seq.context - seq.length + token : -1;
    state.top[half] = -INFINITY;
    state.total[half] = 0.0f;
#pragma unroll
    for (int i = 0; i < WarpState<kDim>::kChunks; ++i) {
      const uint4 v =
          valid ? *reinterpret_cast<const uint4*>(from + 32 * i) : make_uint4(0, 0, 0, 0);
      state.q[i][0][half] = v.x;
      state.q[i][0][half + 2] = v.y;
      state.q[i][1][half] = v.z;
      state.q[i][1][half + 2] = v.w;
    }
  }
#pragma unroll
  for (int i = 0; i < WarpState<kDim>::kOutTiles; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) state.out[i][j] = 0.0f;
  }
}

/// Token of n-tile `j`, column `n`: chosen so that a lane's probabilities belong to 8 consecutive
/// tokens, which is what it loads of a row of transposed values.
__device__ __forceinline__ int token_of(int j, int n) { return 8 * (n >> 1) + 2 * j + (n & 1); }

template <int kDim>
__device__ __forceinline__ void score_step(const WarpState<kDim>& state, const bf16* keys,
                                           float (&s)[4][4]) {
  const int lane = threadIdx.x % kWarp, g = lane / 4, c = lane % 4;
  uint4 k[4][WarpState<kDim>::kChunks];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const uint4* row = reinterpret_cast<const uint4*>(keys + token_of(j, g) * kDim + 8 * c);
#pragma unroll
    for (int i = 0; i < WarpState<kDim>::kChunks; ++i) k[j][i] = __ldg(row + 4 * i);
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) s[j][i] = 0.0f;
#pragma unroll
    for (int i = 0; i < WarpState<kDim>::kChunks; ++i) {
      mma(s[j], state.q[i][0], k[j][i].x, k[j][i].y);
      mma(s[j], state.q[i][1], k[j][i].z, k[j][i].w);
    }
  }
}

/// Masks and scales the scores, rescales the state to the new maximum, leaves probabilities as
/// matrix A.
template <int kDim>
__device__ __forceinline__ void softmax_step(WarpState<kDim>& state, float (&s)[4][4], int position,
                                             float scale_log2, uint32_t (&probability)[2][4]) {
  const int c = threadIdx.x % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float top = state.top[half];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& value = s[j][2 * half + i];
        const bool seen = position + 8 * c + 2 * j + i <= state.last[half];
        value = seen ? value * scale_log2 : -INFINITY;
        top = fmaxf(top, value);
      }
    }
    top = fmaxf(top, __shfl_xor_sync(kFullMask, top, 1));
    top = fmaxf(top, __shfl_xor_sync(kFullMask, top, 2));
    const float base = top == -INFINITY ? 0.0f : top;
    const float shrink = exp2f(state.top[half] - base);
    state.top[half] = top;
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        s[j][2 * half + i] = exp2f(s[j][2 * half + i] - base);
        sum += s[j][2 * half + i];
      }
    }
    state.total[half] = state.total[half] * shrink + sum;
#pragma unroll
    for (int i = 0; i < WarpState<kDim>::kOutTiles; ++i) {
      state.out[i][2 * half] *= shrink;
      state.out[i][2 * half + 1] *= shrink;
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      probability[j / 2][half + 2 * (j % 2)] = pack_bf16(s[j][2 * half], s[j][2 * half + 1]);
    }
  }
}

/// Zeroes the tokens from `count` on in eight consecutive bf16: unwritten cache memory may hold
/// NaN, and 0 * NaN is NaN.
__device__ __forceinline__ uint4 keep_first(uint4 v, int count) {
  auto keep = [count](uint32_t word, int at) {
    return count >= at + 2 ? word : count == at + 1 ? word & 0xffffu : 0u;
  };
  return make_uint4(keep(v.x, 0), keep(v.y, 2), keep(v.z, 4), keep(v.w, 6));
}

template <int kDim>
__device__ __forceinline__ void value_step(WarpState<kDim>& state, const bf16* values, int valid,
                                           const uint32_t (&probability)[2][4]) {
  const int lane = threadIdx.x % kWarp, g = lane / 4, c = lane % 4;
#pragma unroll
  for (int i = 0; i < WarpState<kDim>::kOutTiles; ++i) {
    uint4 v = __ldg(reinterpret_cast<const uint4*>(values + (8 * i + g) * kBlockTokens + 8 * c));
    if (valid < kStepTokens) v = keep_first(v, valid - 8 * c);
    mma(state.out[i], probability[0], v.x, v.y);
    mma(state.out[i], probability[1], v.z, v.w);
  }
}

/// Attends to the 32 tokens from `position` (a multiple of 32) on.
template <int kDim>
__device__ __forceinline__ void attend(WarpState<kDim>& state, const AttentionParams& p,
                                       const int* table, int kv_head, int position, int context) {
  const int64_t block = __ldg(table + position / kBlockTokens);
  const int64_t base = (block * p.kv_heads + kv_head) * (kBlockTokens * kDim);
  const int inside = position % kBlockTokens;
  float s[4][4];
  uint32_t probability[2][4];
  score_step(state, p.key_cache + base + inside * kDim, s);
  softmax_step(state, s, position, p.scale_log2, probability);
  value_step(state, p.value_cache + base + inside, context - position, probability);
}

/// Sum over the four lanes that share a row.
template <int kDim>
__device__ __forceinline__ void finish_totals(WarpState<kDim>& state) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    state.total[half] += __shfl_xor_sync(kFullMask, state.total[half], 1);
    state.total[half] += __shfl_xor_sync(kFullMask, state.total[half], 2);
  }
}

/// Sequences whose rows fill more than one warp: 64 rows a block, 16 a warp.
template <int kDim>
__global__ void __launch_bounds__(kWarps* kWarp) prefill_attention(const AttentionParams p) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  // the block's sequence: warp-wide running sum of tiles per sequence
  int before = 0, owner = -1, tile = 0;
  for (int b0 = 0; b0 < p.sequences && owner < 0; b0 += kWarp) {
    const int b = b0 + lane;
    int tiles = 0;
    if (b < p.sequences) {
      const int rows = (p.cu_seqlens_q[b + 1] - p.cu_seqlens_q[b]) * p.group;
      tiles = rows > kRows ? (rows + kRows * kWarps - 1) / (kRows * kWarps) : 0;
    }
    int upto = tiles;
#pragma unroll
    for (int offset = 1; offset < kWarp; offset *= 2) {
      const int other = __shfl_up_sync(kFullMask, upto, offset);
      if (lane >= offset) upto += other;
    }
    const int index = static_cast<int>(blockIdx.x) - before;
    const unsigned past = __ballot_sync(kFullMask, upto > index);
    if (past != 0) {
      const int which = __ffs(past) - 1;
      owner = b0 + which;
      tile = index - __shfl_sync(kFullMask, upto - tiles, which);
    }
    before += __shfl_sync(kFullMask, upto, kWarp - 1);
  }
  if (owner < 0) return;
  const Sequence seq = load_sequence(p, owner);
  const int kv_head = blockIdx.y;
  const int first_row = tile * kRows * kWarps + warp * kRows;
  const int rows = seq.length * p.group;
  if (first_row >= rows) return;

  WarpState<kDim> state;
  load_queries(state, p, seq, kv_head, first_row);
  const int last_row = min(first_row + kRows, rows) - 1;
  const int last = seq.context - seq.length + last_row / p.group;
  const int* table = p.block_tables + int64_t{owner} * p.table_width;
  for (int position = 0; position <= last; position += kStepTokens) {
    attend(state, p, table, kv_head, position, seq.context);
  }
  finish_totals(state);
  const int g = lane / 4, c = lane % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first_row + g + 8 * half;
    if (row >= rows) continue;
    const int head = kv_head * p.group + row % p.group;
    const int64_t to = (int64_t{seq.first + row / p.group} * p.query_heads + head) * kDim + 2 * c;
    const float inverse = 1.0f / state.total[half];
#pragma unroll
    for (int i = 0; i < WarpState<kDim>::kOutTiles; ++i) {
      *reinterpret_cast<uint32_t*>(p.out + to + 8 * i) =
          pack_bf16(state.out[i][2 * half] * inverse, state.out[i][2 * half + 1] * inverse);
    }
  }
}

/// Parts of a context that have any tokens; the other blocks of a sequence have nothing to do.
__device__ __forceinline__ int active_splits(const AttentionParams& p, const Sequence& seq) {
  const int steps = (seq.context + kStepTokens - 1) / kStepTokens;
  return min(p.splits, (steps + kWarps - 1) / kWarps);
}

/// Floats of one row in the partial results: unnormalised output, maximum, sum.
constexpr int partial_width(int dim) { return dim + 2; }

template <int kDim>
__device__ __forceinline__ void store_row(const AttentionParams& p, const Sequence& seq,
                                          int kv_head, int row, int d, float value) {
  const int head = kv_head * p.group + row % p.group;
  const int64_t token = seq.first + row / p.group;
  p.out[(token * p.query_heads + head) * kDim + d] = __float2bfloat16_rn(value);
}

/// Sequences whose rows fit one warp (decode): the four warps of a block and `splits` blocks share
/// the context.
template <int kDim>
__global__ void __launch_bounds__(kWarps* kWarp) decode_attention(const AttentionParams p) {
  constexpr int kWidth = partial_width(kDim);
  __shared__ float shared[kWarps][kRows][kWidth];
  const int b = blockIdx.x, kv_head = blockIdx.y, split = blockIdx.z;
  const Sequence seq = load_sequence(p, b);
  const int rows = seq.length * p.group;
  const int splits = active_splits(p, seq);
  if (rows > kRows || rows <= 0 || split >= splits) return;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int g = lane / 4, c = lane % 4;

  WarpState<kDim> state;
  load_queries(state, p, seq, kv_head, 0);
  const int* table = p.block_tables + int64_t{b} * p.table_width;
  const int steps = (seq.context + kStepTokens - 1) / kStepTokens;
  const int stride = kWarps * splits;
  for (int step = split * kWarps + warp; step < steps; step += stride) {
    attend(state, p, table, kv_head, step * kStepTokens, seq.context);
  }
  finish_totals(state);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float* row = shared[warp][g + 8 * half];
#pragma unroll
    for (int i = 0; i < WarpState<kDim>::kOutTiles; ++i) {
      row[8 * i + 2 * c] = state.out[i][2 * half];
      row[8 * i + 2 * c + 1] = state.out[i][2 * half + 1];
    }
    if (c == 0) {
      row[kDim] = state.top[half];
      row[kDim + 1] = state.total[half];
    }
  }
  __syncthreads();
  float* partial =
      p.partial + ((int64_t{b} * p.kv_heads + kv_head) * p.splits + split) * kRows * kWidth;
  for (int i = threadIdx.x; i < rows * kDim; i += kWarps * kWarp) {
    const int row = i / kDim, d = i % kDim;
    float top = -INFINITY;
    for (int w = 0; w < kWarps; ++w) top = fmaxf(top, shared[w][row][kDim]);
    const float base = top == -INFINITY ? 0.0f : top;
    float total = 0.0f, value = 0.0f;
    for (int w = 0; w < kWarps; ++w) {
      const float share = exp2f(shared[w][row][kDim] - base);
      total += share * shared[w][row][kDim + 1];
      value += share * shared[w][row][d];
    }
    if (p.splits == 1) {
      store_row<kDim>(p, seq, kv_head, row, d, value / total);
    } else {
      partial[row * kWidth + d] = value;
      if (d == 0) {
        partial[row * kWidth + kDim] = top;
        partial[row * kWidth + kDim + 1] = total;
      }
    }
  }
}

/// One block a row, one thread a feature.
template <int kDim>
__global__ void merge_splits(const AttentionParams p) {
  constexpr int kWidth = partial_width(kDim);
  const int b = blockIdx.x, kv_head = blockIdx.y, row = blockIdx.z, d = threadIdx.x;
  const Sequence seq = load_sequence(p, b);
  const int rows = seq.length * p.group;
  if (rows > kRows || row >= rows) return;
  const int splits = active_splits(p, seq);
  const float* at =
      p.partial + ((int64_t{b} * p.kv_heads + kv_head) * p.splits * kRows + row) * kWidth;
  float top = -INFINITY, total = 0.0f, value = 0.0f;
#pragma unroll 4
  for (int s = 0; s < splits; ++s) {
    const float* part = at + int64_t{s} * kRows * kWidth;
    const float higher = fmaxf(top, part[kDim]);
    const float keep = exp2f(top - higher), share = exp2f(part[kDim] - higher);
    total = total * keep + share * part[kDim + 1];
    value = value * keep + share * part[d];
    top = higher;
  }
  store_row<kDim>(p, seq, kv_head, row, d, value / total);
}

template <int kDim>
void launch_attention(const AttentionParams& p, int tokens, cudaStream_t stream) {
  const bool may_prefill = tokens * p.group > kRows && (tokens > p.sequences || p.group > kRows);
  if (may_prefill) {
    const int tiles = tokens * p.group / (kRows * kWarps) + p.sequences;
    prefill_attention<kDim><<<dim3(tiles, p.kv_heads), kWarps * kWarp, 0, stream>>>(p);
    check_launch("prefill_attention");
  }
  if (p.group > kRows) return;
  const dim3 grid(p.sequences, p.kv_heads, p.splits);
  decode_attention<kDim><<<grid, kWarps * kWarp, 0, stream>>>(p);
  check_launch("decode_attention");
  if (p.splits > 1) {
    const int rows = tokens > p.sequences ? kRows : p.group;  // pure decode: one token a sequence
    merge_splits<kDim><<<dim3(p.sequences, p.kv_heads, rows), kDim, 0, stream>>>(p);
    check_launch("merge_splits");
  }
}

/// One thread a pair of features of one head of one token: rotate q and k, copy v.
__global__ void rope_kernel(const bf16* qkv, const int* positions, const float* cos_sin,
                            const int* slot_mapping, bf16* key_cache, bf16* value_cache,
                            bf16* q_out, AttentionShape shape, int max_positions) {
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
    const float2 x = unpack_bf16(from[i]);
    const int kv_head = (head - shape.query_heads) % shape.kv_heads;
    const int64_t block =
        (int64_t{slot / kBlockTokens} * shape.kv_heads + kv_head) * kBlockTokens * shape.head_dim;
    if (head >= shape.query_heads + shape.kv_heads) {
      if (!cached) continue;
      bf16* to = value_cache + block + int64_t{2 * pair} * kBlockTokens + slot % kBlockTokens;
      to[0] = __float2bfloat16_rn(x.x);
      to[kBlockTokens] = __float2bfloat16_rn(x.y);
      continue;
    }
    const float cosine = table[pair], sine = table[half_dim + pair];
    const uint32_t rotated = pack_bf16(x.x * cosine - x.y * sine, x.y * cosine + x.x * sine);
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

int attention_splits(const AttentionShape& shape, int multiprocessors) {
  // two blocks an SM keep the memory busy; more than 64 parts cost more to merge than they win
  const int blocks = shape.sequences * shape.kv_heads;
  const int wanted = ceil_div(2 * multiprocessors, blocks);
  const int longest = ceil_div(shape.table_width * kBlockTokens, kWarps * kStepTokens);
  int splits = wanted < longest ? wanted : longest;
  splits = splits < 64 ? splits : 64;
  return splits > 1 ? splits : 1;
}

int64_t attention_partial_floats(const AttentionShape& shape, int splits) {
  return splits == 1 ? 0
                     : int64_t{shape.sequences} * shape.kv_heads * splits * kRows *
                           partial_width(shape.head_dim);
}

void rope_and_cache(const bf16* qkv, const int* positions, const float* cos_sin,
                    const int* slot_mapping, bf16* key_cache, bf16* value_cache, bf16* q_out,
                    const AttentionShape& shape, int max_positions, cudaStream_t stream) {
  constexpr int kThreads = 256;
  const int pairs = (shape.query_heads + 2 * shape.kv_heads) * shape.head_dim / 2;
  const dim3 grid(shape.tokens, ceil_div(pairs, 2 * kThreads));
  rope_kernel<<<grid, kThreads, 0, stream>>>(qkv, positions, cos_sin, slot_mapping, key_cache,
                                             value_cache, q_out, shape, max_positions);
  check_launch("rope_and_cache");
}

void paged_attention(const bf16* q, const bf16* key_cache, const bf16* value_cache,
                     const int* block_tables, const int* cu_seqlens_q, const int* context_lens,
                     float scale, int splits, float* partial, bf16* out,
                     const AttentionShape& shape, cudaStream_t stream) {
  const AttentionParams p{q,
                          key_cache,
                          value_cache,
                          block_tables,
                          cu_seqlens_q,
                          context_lens,
                          partial,
                          out,
                          scale * kLog2e,
                          shape.query_heads,
                          shape.kv_heads,
                          shape.query_heads / shape.kv_heads,
                          shape.table_width,
                          splits,
                          shape.sequences};
  switch (shape.head_dim) {
    case 32:
      return launch_attention<32>(p, shape.tokens, stream);
    case 64:
      return launch_attention<64>(p, shape.tokens, stream);
    case 128:
      return launch_attention<128>(p, shape.tokens, stream);
    default:
      throw std::runtime_error("paged_attention: head_dim " + std::to_string(shape.head_dim) +
                               " is not supported, expected 32, 64 or 128");
  }
}

}  // namespace fd::cuda

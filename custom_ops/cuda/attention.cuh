// The arithmetic of attention that both kernels share, so that a token's result has the same bits
// whichever of them computes it.
//
// A token that sees n tokens cuts them into segments of L = 256 * 2^k tokens, k the smallest that
// leaves at most 32 segments. A segment is a running softmax from an empty state in steps of 64
// tokens; the result is the ordered merge of the segments. Nothing else enters: not the batch, not
// the chunk that the token came in, not its row in a tile.
//
// What keeps the bits: every product and sum whose rounding matters is an explicit intrinsic (the
// compiler must not contract one kernel's differently), a score that a row does not see adds exact
// zeros, and a state that did not change is multiplied by exactly one.
#pragma once

#include "common.cuh"
#include "gemm/attention_shape.h"
#include "ops.h"

namespace fd::cuda {

constexpr int kHalfTokens = 32;  // tokens that one tile of scores spans
constexpr int kHalves = kBlockTokens / kHalfTokens;
constexpr int kAttentionWarps = 8;
constexpr int kAttentionThreads = kAttentionWarps * kWarp;
static_assert(kMaxListed <= kAttentionThreads, "a thread lists each sequence");

/// Tokens whose queries, keys and values are still as the projection left them.
struct NewTokens {
  const bf16* qkv = nullptr;  // null: queries are turned, keys and values in the cache
  const int* positions;
  const float* cos_sin;
  const int* slots;
  bf16* key_cache;
  bf16* value_cache;
  int max_positions;
  int num_blocks;
};

/// What the blocks of a launch of decode_attention count together. Zero before it, and again when
/// it has ended; so launches that may overlap need counters each.
struct AttentionCounters {
  /// Segments of a sequence and KV head that are done, where the block of the last merges them all.
  int merge_tickets[kMostTickets];
  /// Segments drawn by all blocks beyond their first two, and blocks that will draw no more.
  int drawn_segments;
  int finished_blocks;
};

struct AttentionParams {
  const bf16* q;
  const bf16* key_cache;
  const bf16* value_cache;
  const int* block_tables;
  const int* cu_seqlens_q;
  const int* context_lens;
  float* partial;
  AttentionCounters* counters;
  bf16* out;
  float scale_log2;
  int query_heads;
  int kv_heads;
  int group;  // query heads per KV head
  int table_width;
  int segments;  // that a context of this table can have at most
  int sequences;
  bool merge_apart;  // blocks take more than one segment each: another kernel merges
  NewTokens fresh;
};

template <int kDim>
void launch_decode(const AttentionParams& p, int blocks, cudaStream_t stream);
template <int kDim>
void launch_prefill(const AttentionParams& p, int tokens, cudaStream_t stream);
/// The same for heads of 128 on Hopper, see chunks_on_wgmma().
void launch_prefill_sm90(const AttentionParams& p, int num_blocks, int tokens, cudaStream_t stream);

#ifdef __CUDACC__
/// log2 of the segment length of a token that sees `context` > 0 tokens.
__device__ __forceinline__ int segment_bits(int context) {
  return max(kSegmentBits, 32 - __clz(context - 1) - kMaxSegmentsBits);
}

/// A pair of features turned by its angle; see rope.cu.
__device__ __forceinline__ uint32_t turned_pair(uint32_t pair, float cosine, float sine) {
  const float2 x = unpack_bf16(pair);
  return pack_bf16(__fmaf_rn(x.x, cosine, -__fmul_rn(x.y, sine)),
                   __fmaf_rn(x.y, cosine, __fmul_rn(x.x, sine)));
}

// --- scores

/// Which 4 of 16 consecutive features lane % 4 = `c` multiplies in product `i`: those that it holds
/// when lanes c read 16 bytes each and the lanes two apart then trade their second halves. (The
/// order inside a product has no influence on Hopper, whose wgmma takes the same features in its
/// own.)
__device__ __forceinline__ int piece_of(int i, int c) { return (c % 2 * 2 + c / 2) ^ i % 2; }

/// 16 query rows as matrix A; a product takes 16 consecutive features, and keys alike.
template <int kDim>
struct Queries {
  static constexpr int kProducts = kDim / 16;
  uint32_t a[kProducts][4];

  /// rows: of the lane's rows lane / 4 and lane / 4 + 8; null reads as zeros.
  __device__ __forceinline__ void load(const bf16* const (&rows)[2]) {
    const int c = threadIdx.x % 4;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int i = 0; i < kProducts; ++i) {
        const uint2 v = rows[r] != nullptr
                            ? *reinterpret_cast<const uint2*>(rows[r] + 16 * i + 4 * piece_of(i, c))
                            : make_uint2(0, 0);
        a[i][r] = v.x;
        a[i][r + 2] = v.y;
      }
    }
  }

  /// angles: cosines, then sines of the rows' position.
  __device__ __forceinline__ void turn(const float* angles) {
    const int c = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < kProducts; ++i) {
      const float* from = angles + 8 * i + 2 * piece_of(i, c);
      const float2 cosine = *reinterpret_cast<const float2*>(from);
      const float2 sine = *reinterpret_cast<const float2*>(from + kDim / 2);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        a[i][r] = turned_pair(a[i][r], cosine.x, sine.x);
        a[i][r + 2] = turned_pair(a[i][r + 2], cosine.y, sine.y);
      }
    }
  }
};

/// Raw scores of kWide half steps together, so that products do not wait for each other. key(h, j,
/// i): features 16 * i + 4 * piece_of(i, lane % 4) .. + 3 of token 8 * j + lane / 4 in half h.
template <int kDim, int kWide, typename Key>
__device__ __forceinline__ void score(const Queries<kDim>& q, Key key, float (&s)[kWide][4][4]) {
#pragma unroll
  for (int h = 0; h < kWide; ++h) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s[h][j][i] = 0.0f;
    }
  }
#pragma unroll
  for (int i = 0; i < Queries<kDim>::kProducts; ++i) {
    uint2 k[kWide * 4];
#pragma unroll
    for (int n = 0; n < kWide * 4; ++n) k[n] = key(n / 4, n % 4, i);
#pragma unroll
    for (int n = 0; n < kWide * 4; ++n) mma(s[n / 4][n % 4], q.a[i], k[n].x, k[n].y);
  }
}

/// Hides the tokens after each row's last one; `position` is the half's first token.
__device__ __forceinline__ void mask_half(float (&s)[4][4], int position, const int (&last)[2]) {
  const int c = threadIdx.x % 4;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (position + 8 * j + 2 * c + i % 2 > last[i / 2]) s[j][i] = -INFINITY;
    }
  }
}

/// The lane's largest score of row `r`.
__device__ __forceinline__ float lane_top(const float (&s)[4][4], int r) {
  float top = fmaxf(s[0][2 * r], s[0][2 * r + 1]);
#pragma unroll
  for (int j = 1; j < 4; ++j) top = fmaxf(top, fmaxf(s[j][2 * r], s[j][2 * r + 1]));
  return top;
}

/// Largest over the four lanes that share a row.
__device__ __forceinline__ float row_top(float top) {
  top = fmaxf(top, __shfl_xor_sync(kFullMask, top, 1));
  return fmaxf(top, __shfl_xor_sync(kFullMask, top, 2));
}

// --- running softmax

/// The exponent that probabilities are taken relative to. It follows the maximum only when that is
/// more than 2^8 above it, so that most steps rescale nothing; sums have room for 2^8 more.
__device__ __forceinline__ float advance_base(float base, float top, float scale_log2) {
  const float scaled = __fmul_rn(top, scale_log2);
  return scaled > __fadd_rn(base, 8.0f) ? scaled : base;
}

/// Factor of a state when its base moves; an empty state is all zeros and needs none.
__device__ __forceinline__ float shrink_of(float base, float moved) {
  return base == -INFINITY ? 1.0f : exp2_fast(__fsub_rn(base, moved));
}

/// Scores of 32 tokens -> their exponentials in place, and the lane's sum of each row.
__device__ __forceinline__ void exponentials(float (&s)[4][4], float scale_log2,
                                             const float (&base)[2], float (&sum)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float offset = base[r] == -INFINITY ? 0.0f : -base[r];
    float pair[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      s[j][2 * r] = exp2_fast(__fmaf_rn(s[j][2 * r], scale_log2, offset));
      s[j][2 * r + 1] = exp2_fast(__fmaf_rn(s[j][2 * r + 1], scale_log2, offset));
      pair[j] = __fadd_rn(s[j][2 * r], s[j][2 * r + 1]);
    }
    sum[r] = __fadd_rn(__fadd_rn(pair[0], pair[1]), __fadd_rn(pair[2], pair[3]));
  }
}

/// Exponentials of 32 tokens -> matrices A of two products, 16 consecutive tokens each.
__device__ __forceinline__ void probabilities(const float (&s)[4][4], uint32_t (&a)[2][4]) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      a[j / 2][r + 2 * (j % 2)] = pack_bf16(s[j][2 * r], s[j][2 * r + 1]);
    }
  }
}

__device__ __forceinline__ float advance_total(float total, float shrink, float half0,
                                               float half1) {
  return __fmaf_rn(total, shrink, __fadd_rn(half0, half1));
}

/// Sum over the four lanes that share a row.
__device__ __forceinline__ float row_total(float total) {
  total = __fadd_rn(total, __shfl_xor_sync(kFullMask, total, 1));
  return __fadd_rn(total, __shfl_xor_sync(kFullMask, total, 2));
}

/// Zeroes the tokens from `count` on in eight consecutive bf16: unwritten cache memory may hold
/// NaN, and 0 * NaN is NaN.
__device__ __forceinline__ uint4 keep_first(uint4 v, int count) {
  auto keep = [count](uint32_t word, int at) {
    return count >= at + 2 ? word : count == at + 1 ? word & 0xffffu : 0u;
  };
  return make_uint4(keep(v.x, 0), keep(v.y, 2), keep(v.z, 4), keep(v.w, 6));
}

// --- merge of segments

struct Shares {
  float before;
  float part;
};

/// Factors of what was merged before and of the next part; `base` becomes their common base. An
/// empty side gets 0, the other then 1.
__device__ __forceinline__ Shares merge_bases(float& base, float part) {
  const float higher = fmaxf(base, part);
  const float offset = higher == -INFINITY ? 0.0f : higher;
  const Shares shares{exp2_fast(__fsub_rn(base, offset)), exp2_fast(__fsub_rn(part, offset))};
  base = higher;
  return shares;
}

__device__ __forceinline__ float merge(float before, float part, const Shares& shares) {
  return __fmaf_rn(before, shares.before, __fmul_rn(part, shares.part));
}

/// value * inverse; adding 0 turns -0 into 0, whose sign alone would tell how zeros were merged.
__device__ __forceinline__ float normalise(float value, float inverse) {
  return __fmaf_rn(value, inverse, 0.0f);
}

// --- work lists

/// Units of work of up to kMaxListed sequences, so that a block finds its own without a grid that
/// has room for the longest context of every sequence.
struct WorkList {
  int first[kMaxListed + 1];  // units before each sequence
  int token[kMaxListed + 1];  // cu_seqlens_q
  int context[kMaxListed];
  int warp_units[kAttentionWarps];

  /// Fills the list; units(length, context) of one sequence. Called by all threads of a block, of
  /// which the first kMaxListed work.
  template <typename Units>
  __device__ __forceinline__ void fill(const AttentionParams& p, Units units) {
    const int b = threadIdx.x, lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    int count = 0;
    if (b < p.sequences) {
      const int from = p.cu_seqlens_q[b], to = p.cu_seqlens_q[b + 1];
      context[b] = p.context_lens[b];
      token[b] = from;
      if (b == p.sequences - 1) token[b + 1] = to;
      count = units(to - from, context[b]);
    }
    int upto = count;
#pragma unroll
    for (int offset = 1; offset < kWarp; offset *= 2) {
      const int other = __shfl_up_sync(kFullMask, upto, offset);
      if (lane >= offset) upto += other;
    }
    if (b < kMaxListed && lane == kWarp - 1) warp_units[warp] = upto;
    __syncthreads();
    if (b < kMaxListed) {
      for (int w = 0; w < warp; ++w) upto += warp_units[w];
      first[b + 1] = upto;
      if (b == 0) first[0] = 0;
    }
    __syncthreads();
  }

  __device__ __forceinline__ int total() const { return first[kMaxListed]; }

  /// The sequence that holds `unit`, which is below total().
  __device__ __forceinline__ int owner(int unit) const {
    int b = 0;
#pragma unroll
    for (int step = kMaxListed / 2; step > 0; step /= 2) {
      if (first[b + step] <= unit) b += step;
    }
    return b;
  }
};

/// A single token of a sequence: its rows fit one tile and its segments go to blocks of their own.
__device__ __forceinline__ bool is_decode(const AttentionParams& p, int length) {
  return length == 1 && p.group <= kRows;
}
#endif  // __CUDACC__

}  // namespace fd::cuda

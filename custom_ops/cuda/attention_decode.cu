// Attention of single tokens: the segments of a context go to different blocks, another kernel
// merges them. (The last block to arrive could merge, but it would have to wait at a fence for the
// copies that it has under way for its next segment.) See attention.cuh for the arithmetic.
//
// A block's warps share a round of 256 tokens twice: first by tokens (each scores 32), then by
// features (each multiplies all probabilities with its own rows of transposed values). So sums over
// tokens keep the order of one running softmax, without one warp walking through all tokens.
#include "attention.cuh"

namespace fd::cuda {
namespace {

constexpr int kRoundTokens = kAttentionWarps * kHalfTokens;
constexpr int kRoundSteps = kRoundTokens / kBlockTokens;
static_assert(kRoundTokens == 1 << kSegmentBits, "a segment is a whole number of rounds");

/// Floats of one row in the partial results: unnormalised output, base, sum.
constexpr int partial_width(int dim) { return dim + 2; }

/// Segments of a context that decode_attention takes; 0: the sequence is prefill_attention's.
__device__ __forceinline__ int decode_segments(const AttentionParams& p, int length, int context) {
  if (!is_decode(p, length) || context <= 0) return 0;
  return ((context - 1) >> segment_bits(context)) + 1;
}

/// Where the results of a segment stand: rows of outputs, then a (base, sum) pair for each row.
template <int kDim>
__device__ __forceinline__ float* partial_of(const AttentionParams& p, int sequence, int kv_head,
                                             int index) {
  const int64_t at = (int64_t{sequence} * p.segments + index) * p.kv_heads + kv_head;
  return p.partial + at * (p.group * partial_width(kDim));
}

template <int kDim>
struct DecodeShared {
  static constexpr int kOutTiles = kDim / 8;
  static constexpr int kTiles = ceil_div(kOutTiles, kAttentionWarps);  // of one warp
  // a warp reads back what it copied
  uint4 values[kAttentionWarps][kTiles][kAttentionWarps][kWarp];
  uint4 probabilities[kAttentionWarps][2][kWarp];
  float top[kAttentionWarps][kRows];
  float sum[kAttentionWarps][2][kWarp];
  WorkList work;
  int drawn;
  bool merges;
};

/// One segment of one sequence and KV head.
struct Segment {
  int item;      // of all segments and KV heads of this launch
  int sequence;  // in this launch
  int kv_head;
  int begin;
  int end;
  int context;
  int index;  // of this segment
  int count;  // segments of the context
};

__device__ __forceinline__ Segment find_segment(const WorkList& work, int item, int kv_heads) {
  Segment found;
  const int unit = item / kv_heads, b = work.owner(unit);
  const int bits = segment_bits(work.context[b]);
  found.item = item;
  found.sequence = b;
  found.kv_head = item - unit * kv_heads;
  found.index = unit - work.first[b];
  found.count = work.first[b + 1] - work.first[b];
  found.context = work.context[b];
  found.begin = found.index << bits;
  found.end = min(found.context, found.begin + (1 << bits));
  return found;
}

/// Up to 256 tokens of a segment, and the cache blocks that hold them.
struct Round {
  Segment segment;
  int start;
  int steps;  // 0: there are no more rounds
  int blocks[kRoundSteps];
  int own_block;  // of the tokens that the warp scores

  __device__ __forceinline__ void find_blocks(const AttentionParams& p) {
    const int* table =
        p.block_tables + int64_t{segment.sequence} * p.table_width + start / kBlockTokens;
    const int own_step = threadIdx.x / kWarp / kHalves;
    steps = ceil_div(min(kRoundTokens, segment.end - start), kBlockTokens);
#pragma unroll
    for (int step = 0; step < kRoundSteps; ++step) {
      if (step < steps) blocks[step] = table[step];
    }
    if (own_step < steps) own_block = table[own_step];
  }

  __device__ __forceinline__ bool ends_segment() const {
    return start + kRoundTokens >= segment.end;
  }

  /// Moves on in the segment or, at its end, to the segment `upcoming`; past the last of `items`
  /// there are no steps.
  __device__ __forceinline__ void advance(const WorkList& work, const AttentionParams& p,
                                          int upcoming, int items) {
    start += kRoundTokens;
    steps = 0;
    if (start >= segment.end) {
      if (upcoming >= items) return;
      segment = find_segment(work, upcoming, p.kv_heads);
      start = segment.begin;
    }
    find_blocks(p);
  }
};

/// Row of the projection's output that holds a new token's head `head` of all of its heads.
template <int kDim>
__device__ __forceinline__ const bf16* new_row(const AttentionParams& p, int token, int head) {
  return p.fresh.qkv + (int64_t{token} * (p.query_heads + 2 * p.kv_heads) + head) * kDim;
}

/// Cosines and sines of a token's position.
template <int kDim>
__device__ __forceinline__ const float* new_angles(const AttentionParams& p, int token) {
  const int position = min(max(p.fresh.positions[token], 0), p.fresh.max_positions - 1);
  return p.fresh.cos_sin + int64_t{position} * kDim;
}

/// First element of a KV head in the cache block of a new token; -1 where none is to be kept.
template <int kDim>
__device__ __forceinline__ int64_t kept_at(const AttentionParams& p, int slot, int kv_head) {
  const int block = slot / kBlockTokens;
  if (slot < 0 || block >= p.fresh.num_blocks) return -1;
  return (int64_t{block} * p.kv_heads + kv_head) * kBlockTokens * kDim;
}

/// The warp's keys of a round, in registers: they are read once, and the next round's come while
/// this one is computed.
template <int kDim>
struct Keys {
  uint4 k[4][Queries<kDim>::kProducts / 2];

  __device__ __forceinline__ void load(const AttentionParams& p, const Round& round) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, g = lane / 4, c = lane % 4;
    if (warp >= kHalves * round.steps) return;
    const int64_t row =
        (int64_t{round.own_block} * p.kv_heads + round.segment.kv_head) * kBlockTokens +
        warp % kHalves * kHalfTokens;
    const bf16* from = p.key_cache + row * kDim + 8 * c;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint4* token = reinterpret_cast<const uint4*>(from + (8 * j + g) * kDim);
#pragma unroll
      for (int i = 0; i < Queries<kDim>::kProducts / 2; ++i) k[j][i] = token[4 * i];
    }
  }

  /// Puts the key of the sequence's new token in its place, if that is among the warp's, and into
  /// the cache.
  __device__ __forceinline__ void take_new(const AttentionParams& p, const Round& round,
                                           int token) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, c = lane % 4;
    const int at = round.segment.context - 1 - round.start - warp * kHalfTokens;
    if (round.steps == 0 || at < 0 || at >= kHalfTokens || lane / 4 != at % 8) return;
    const int head = round.segment.kv_head, slot = p.fresh.slots[token];
    const bf16* from = new_row<kDim>(p, token, p.query_heads + head) + 8 * c;
    const float* angles = new_angles<kDim>(p, token) + 4 * c;
    const int64_t kept = kept_at<kDim>(p, slot, head);
#pragma unroll
    for (int i = 0; i < Queries<kDim>::kProducts / 2; ++i) {
      uint4 v = *reinterpret_cast<const uint4*>(from + 32 * i);
      const float4 cosine = *reinterpret_cast<const float4*>(angles + 16 * i);
      const float4 sine = *reinterpret_cast<const float4*>(angles + kDim / 2 + 16 * i);
      v = make_uint4(turned_pair(v.x, cosine.x, sine.x), turned_pair(v.y, cosine.y, sine.y),
                     turned_pair(v.z, cosine.z, sine.z), turned_pair(v.w, cosine.w, sine.w));
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const bool here = at / 8 == j;
        k[j][i] = make_uint4(here ? v.x : k[j][i].x, here ? v.y : k[j][i].y, here ? v.z : k[j][i].z,
                             here ? v.w : k[j][i].w);
      }
      if (kept < 0) continue;
      bf16* to = p.fresh.key_cache + kept + slot % kBlockTokens * kDim + 32 * i + 8 * c;
      *reinterpret_cast<uint4*>(to) = v;
    }
  }

  /// Features of product `i`, see piece_of: lanes 0 and 1 hold the first, 2 and 3 the second.
  __device__ __forceinline__ uint2 of_product(int j, int i) const {
    const uint4& v = k[j][i / 2];
    const uint2 other =
        make_uint2(__shfl_xor_sync(kFullMask, v.z, 2), __shfl_xor_sync(kFullMask, v.w, 2));
    const bool own = (threadIdx.x % 4 < 2) == (i % 2 == 0);
    return own ? make_uint2(v.x, v.y) : other;
  }
};

/// A warp's part of a segment: the running softmax of all rows, the output's own features.
template <int kDim>
struct DecodeState {
  float out[DecodeShared<kDim>::kTiles][4] = {};
  float base[2] = {-INFINITY, -INFINITY};
  float total[2] = {};  // the lane's share
};

template <int kDim>
__device__ __forceinline__ bool has_features() {
  return threadIdx.x / kWarp * DecodeShared<kDim>::kTiles < DecodeShared<kDim>::kOutTiles;
}

/// Where a lane's copy of features lane / 4, tokens 8 * (lane % 4) of a half lies: turned so that
/// the eight rows of a matrix, which have one lane % 4, lie in different banks.
__device__ __forceinline__ int turned(int feature, int chunk) {
  return 4 * feature + (chunk ^ (feature >> 1));
}

template <int kDim>
__device__ __forceinline__ void fetch_step(DecodeShared<kDim>& shared, const AttentionParams& p,
                                           int block, int kv_head, int step) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, g = lane / 4, c = lane % 4;
  const int first_row = warp * DecodeShared<kDim>::kTiles * 8 + g;
  const int64_t row = (int64_t{block} * p.kv_heads + kv_head) * kDim + first_row;
  const bf16* from = p.value_cache + row * kBlockTokens + 8 * c;
#pragma unroll
  for (int h = 0; h < kHalves; ++h) {
#pragma unroll
    for (int t = 0; t < DecodeShared<kDim>::kTiles; ++t) {
      copy_async(&shared.values[warp][t][kHalves * step + h][turned(g, c)],
                 from + 8 * t * kBlockTokens + h * kHalfTokens, true);
    }
  }
}

/// Starts the copies of the warp's features of a round's values.
template <int kDim>
__device__ __forceinline__ void fetch_values(DecodeShared<kDim>& shared, const AttentionParams& p,
                                             const Round& round) {
  if (has_features<kDim>()) {
#pragma unroll
    for (int step = 0; step < kRoundSteps; ++step) {
      if (step >= round.steps) continue;
      fetch_step(shared, p, round.blocks[step], round.segment.kv_head, step);
    }
  }
  copy_commit();
}

/// Scores the warp's 32 tokens and publishes each row's largest.
template <int kDim>
__device__ __forceinline__ void score_round(DecodeShared<kDim>& shared, const Queries<kDim>& q,
                                            const Keys<kDim>& keys, const Round& round,
                                            float (&s)[1][4][4]) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int position = round.start + warp * kHalfTokens, last = round.segment.context - 1;
  if (warp >= kHalves * round.steps) return;
  score<kDim, 1>(q, [&keys](int, int j, int i) { return keys.of_product(j, i); }, s);
  if (position + kHalfTokens - 1 > last) mask_half(s[0], position, {last, last});
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float top = row_top(lane_top(s[0], r));
    if (lane % 4 == 0) shared.top[warp][lane / 4 + 8 * r] = top;
  }
}

/// Adds one step's probabilities times the warp's features.
template <int kDim>
__device__ __forceinline__ void value_step(const DecodeShared<kDim>& shared,
                                           DecodeState<kDim>& state, const float (&shrink)[2],
                                           int step) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll
  for (int t = 0; t < DecodeShared<kDim>::kTiles; ++t) {
#pragma unroll
    for (int i = 0; i < 4; ++i) state.out[t][i] = __fmul_rn(state.out[t][i], shrink[i / 2]);
  }
#pragma unroll
  for (int h = 0; h < kHalves; ++h) {
    const int half = kHalves * step + h;
    const uint4 low = shared.probabilities[half][0][lane];
    const uint4 high = shared.probabilities[half][1][lane];
    const uint32_t a[2][4] = {{low.x, low.y, low.z, low.w}, {high.x, high.y, high.z, high.w}};
#pragma unroll
    for (int t = 0; t < DecodeShared<kDim>::kTiles; ++t) {
      const uint4 v = load_matrices(&shared.values[warp][t][half][turned(lane % 8, lane / 8)]);
      mma(state.out[t], a[0], v.x, v.y);
      mma(state.out[t], a[1], v.z, v.w);
    }
  }
}

/// Follows the bases of all rows through the round, turns the warp's scores into probabilities for
/// all warps.
template <int kDim>
__device__ __forceinline__ void softmax_round(DecodeShared<kDim>& shared, float scale_log2,
                                              int steps, DecodeState<kDim>& state, float (&s)[4][4],
                                              float (&shrink)[kRoundSteps][2]) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, g = lane / 4;
  float own[2];
#pragma unroll
  for (int step = 0; step < kRoundSteps; ++step) {
    if (step >= steps) break;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float top =
          fmaxf(shared.top[kHalves * step][g + 8 * r], shared.top[kHalves * step + 1][g + 8 * r]);
      const float moved = advance_base(state.base[r], top, scale_log2);
      shrink[step][r] = shrink_of(state.base[r], moved);
      state.base[r] = moved;
      if (step == warp / kHalves) own[r] = moved;
    }
  }
  if (warp >= kHalves * steps) return;
  uint32_t a[2][4];
  float sum[2];
  exponentials(s, scale_log2, own, sum);
  probabilities(s, a);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    shared.probabilities[warp][i][lane] = make_uint4(a[i][0], a[i][1], a[i][2], a[i][3]);
    shared.sum[warp][i][lane] = sum[i];
  }
}

/// Puts the values of the sequence's new token among those that the warp has copied, and into the
/// cache.
template <int kDim>
__device__ __forceinline__ void take_new_values(DecodeShared<kDim>& shared,
                                                const AttentionParams& p, const Round& round,
                                                int token) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, g = lane / 4;
  const int at = round.segment.context - 1 - round.start;
  if (at >= round.steps * kBlockTokens || !has_features<kDim>()) return;
  if (lane % 4 != at % kHalfTokens / 8) return;
  const int head = round.segment.kv_head, slot = p.fresh.slots[token];
  const int64_t kept = kept_at<kDim>(p, slot, head);
  const bf16* from = new_row<kDim>(p, token, p.query_heads + p.kv_heads + head);
#pragma unroll
  for (int t = 0; t < DecodeShared<kDim>::kTiles; ++t) {
    const int feature = (warp * DecodeShared<kDim>::kTiles + t) * 8 + g;
    const bf16 value = from[feature];
    uint4& chunk = shared.values[warp][t][at / kHalfTokens][turned(g, lane % 4)];
    reinterpret_cast<bf16*>(&chunk)[at % 8] = value;
    if (kept < 0) continue;
    p.fresh.value_cache[kept + int64_t{feature} * kBlockTokens + slot % kBlockTokens] = value;
  }
}

/// Zeroes the values after the context, of those that the lane has copied.
template <int kDim>
__device__ __forceinline__ void clear_tail(DecodeShared<kDim>& shared, const Round& round) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, g = lane / 4, c = lane % 4;
  const int count = round.segment.context - round.start;
  if (count >= round.steps * kBlockTokens || !has_features<kDim>()) return;
#pragma unroll
  for (int t = 0; t < DecodeShared<kDim>::kTiles; ++t) {
    for (int h = count / kHalfTokens; h < kHalves * round.steps; ++h) {
      uint4& v = shared.values[warp][t][h][turned(g, c)];
      v = keep_first(v, count - h * kHalfTokens - 8 * c);
    }
  }
}

/// Adds the round's probabilities to the sums, and times the warp's features to the output.
template <int kDim>
__device__ __forceinline__ void value_round(const DecodeShared<kDim>& shared, const Round& round,
                                            const float (&shrink)[kRoundSteps][2],
                                            DecodeState<kDim>& state) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int step = 0; step < kRoundSteps; ++step) {
    if (step >= round.steps) break;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      state.total[r] =
          advance_total(state.total[r], shrink[step][r], shared.sum[kHalves * step][r][lane],
                        shared.sum[kHalves * step + 1][r][lane]);
    }
    if (has_features<kDim>()) value_step(shared, state, shrink[step], step);
  }
}

/// First feature of the lane's values in the warp's tile `t`.
template <int kDim>
__device__ __forceinline__ int feature_of(int t) {
  const int warp = threadIdx.x / kWarp;
  return (warp * DecodeShared<kDim>::kTiles + t) * 8 + threadIdx.x % 4 * 2;
}

template <int kDim>
__device__ __forceinline__ bf16* out_row(const AttentionParams& p, int token, int kv_head,
                                         int row) {
  return p.out + (int64_t{token} * p.query_heads + kv_head * p.group + row) * kDim;
}

/// The only segment of its context.
template <int kDim>
__device__ __forceinline__ void store_result(const AttentionParams& p, int token,
                                             const Segment& segment,
                                             const DecodeState<kDim>& state) {
  const int g = threadIdx.x % kWarp / 4;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float inverse = __frcp_rn(row_total(state.total[r]));
    const int row = g + 8 * r;
#pragma unroll
    for (int t = 0; t < DecodeShared<kDim>::kTiles; ++t) {
      const int d = feature_of<kDim>(t);
      if (row >= p.group || d >= kDim) continue;
      *reinterpret_cast<uint32_t*>(out_row<kDim>(p, token, segment.kv_head, row) + d) = pack_bf16(
          normalise(state.out[t][2 * r], inverse), normalise(state.out[t][2 * r + 1], inverse));
    }
  }
}

/// One of several segments.
template <int kDim>
__device__ __forceinline__ void store_partial(const AttentionParams& p, const Segment& segment,
                                              const DecodeState<kDim>& state) {
  const int g = threadIdx.x % kWarp / 4;
  float* part = partial_of<kDim>(p, segment.sequence, segment.kv_head, segment.index);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float total = row_total(state.total[r]);
    const int row = g + 8 * r;
    if (row >= p.group) continue;
#pragma unroll
    for (int t = 0; t < DecodeShared<kDim>::kTiles; ++t) {
      const int d = feature_of<kDim>(t);
      if (d >= kDim) continue;
      *reinterpret_cast<float2*>(part + row * kDim + d) =
          make_float2(state.out[t][2 * r], state.out[t][2 * r + 1]);
    }
    if (threadIdx.x / kWarp == 0 && threadIdx.x % 4 == 0) {
      *reinterpret_cast<float2*>(part + p.group * kDim + 2 * row) =
          make_float2(state.base[r], total);
    }
  }
}

/// Merges the segments of a sequence and KV head in order.
template <int kDim>
__device__ __forceinline__ void merge_rows(const AttentionParams& p, int b, int kv_head, int count,
                                           int token) {
  constexpr int kPairs = kDim / 2, kTogether = 8;
  const int64_t pitch = partial_of<kDim>(p, b, kv_head, 1) - partial_of<kDim>(p, b, kv_head, 0);
  for (int i = threadIdx.x; i < p.group * kPairs; i += blockDim.x) {
    const int row = i / kPairs, d = i % kPairs * 2;
    const float* part = partial_of<kDim>(p, b, kv_head, 0);
    float base = -INFINITY, total = 0.0f;
    float2 value = make_float2(0.0f, 0.0f);
    for (int n0 = 0; n0 < count; n0 += kTogether) {
      float2 x[kTogether], state[kTogether];
#pragma unroll
      for (int n = 0; n < kTogether; ++n) {
        if (n0 + n >= count) continue;
        const float* at = part + (n0 + n) * pitch;
        x[n] = __ldcg(reinterpret_cast<const float2*>(at + row * kDim + d));
        state[n] = __ldcg(reinterpret_cast<const float2*>(at + p.group * kDim + 2 * row));
      }
#pragma unroll
      for (int n = 0; n < kTogether; ++n) {
        if (n0 + n >= count) continue;
        const Shares shares = merge_bases(base, state[n].x);
        total = merge(total, state[n].y, shares);
        value.x = merge(value.x, x[n].x, shares);
        value.y = merge(value.y, x[n].y, shares);
      }
    }
    const float inverse = __frcp_rn(total);
    *reinterpret_cast<uint32_t*>(out_row<kDim>(p, token, kv_head, row) + d) =
        pack_bf16(normalise(value.x, inverse), normalise(value.y, inverse));
  }
}

/// After a block's only segment: the last of a sequence and KV head to get here merges.
template <int kDim>
__device__ __forceinline__ void merge_if_last(DecodeShared<kDim>& shared, const AttentionParams& p,
                                              const Segment& segment) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    int& ticket = p.counters->merge_tickets[segment.sequence * p.kv_heads + segment.kv_head];
    shared.merges = atomicAdd(&ticket, 1) == segment.count - 1;
    if (shared.merges) ticket = 0;
  }
  __syncthreads();
  if (!shared.merges) return;
  __threadfence();
  merge_rows<kDim>(p, segment.sequence, segment.kv_head, segment.count,
                   shared.work.token[segment.sequence]);
}

template <int kDim, bool kNew>
__device__ __forceinline__ void load_queries(Queries<kDim>& q, const AttentionParams& p,
                                             const WorkList& work, const Segment& segment) {
  const int token = work.token[segment.sequence];
  const bf16* rows[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = threadIdx.x % kWarp / 4 + 8 * r, head = segment.kv_head * p.group + row;
    const bf16* from =
        kNew ? new_row<kDim>(p, token, head) : p.q + (int64_t{token} * p.query_heads + head) * kDim;
    rows[r] = row < p.group ? from : nullptr;
  }
  q.load(rows);
  if constexpr (kNew) q.turn(new_angles<kDim>(p, token));
}

/// Which segment a block takes after the upcoming one: the next that no block has drawn, because
/// SMs do not get the same share of the memory's bandwidth.
__device__ __forceinline__ int draw_segment(AttentionCounters* counters) {
  return 2 * gridDim.x + atomicAdd(&counters->drawn_segments, 1);
}

__device__ __forceinline__ void finish_drawing(AttentionCounters* counters) {
  if (threadIdx.x != 0) return;
  if (atomicAdd(&counters->finished_blocks, 1) == static_cast<int>(gridDim.x) - 1) {
    counters->drawn_segments = 0;
    counters->finished_blocks = 0;
  }
}

/// One block an SM takes the segments of all sequences in turn; while a round is computed, the
/// keys and values of the next are on their way.
/// kNew: takes queries, keys and values of the new tokens from the projection's output.
template <int kDim, bool kNew>
__global__ void __launch_bounds__(kAttentionThreads, 1) decode_attention(const AttentionParams p) {
  extern __shared__ uint4 raw[];
  auto& shared = *reinterpret_cast<DecodeShared<kDim>*>(raw);
  // With kNew the kernel ahead writes nothing but `qkv`: the step's arrays and the tokens of the
  // cache are there, and come while it still runs.
  if constexpr (!kNew) wait_for_inputs();
  shared.work.fill(p, [&p](int n, int context) { return decode_segments(p, n, context); });
  const int items = shared.work.total() * p.kv_heads;
  const bool draws = items > 2 * static_cast<int>(gridDim.x);
  if (static_cast<int>(blockIdx.x) >= items) {
    if constexpr (kNew) wait_for_inputs();
    return;
  }
  Round round;
  round.segment = find_segment(shared.work, blockIdx.x, p.kv_heads);
  round.start = round.segment.begin;
  round.find_blocks(p);
  int upcoming = blockIdx.x + gridDim.x;
  auto token_of = [&shared](const Round& of) { return shared.work.token[of.segment.sequence]; };
  Keys<kDim> keys;
  keys.load(p, round);
  fetch_values(shared, p, round);
  if constexpr (kNew) {
    if (threadIdx.x < kDim / 32) prefetch(new_angles<kDim>(p, token_of(round)) + 32 * threadIdx.x);
    wait_for_inputs();
  }
  Queries<kDim> q;
  load_queries<kDim, kNew>(q, p, shared.work, round.segment);
  if constexpr (kNew) keys.take_new(p, round, token_of(round));
  DecodeState<kDim> state;
  while (round.steps > 0) {
    Round next = round;
    next.advance(shared.work, p, upcoming, items);
    const bool taken = round.ends_segment() && next.steps > 0;
    int drawn = items;
    if (taken && draws && threadIdx.x == 0) drawn = draw_segment(p.counters);
    float s[1][4][4], shrink[kRoundSteps][2];
    score_round(shared, q, keys, round, s);
    keys.load(p, next);
    if constexpr (kNew) keys.take_new(p, next, token_of(next));
    __syncthreads();
    softmax_round(shared, p.scale_log2, round.steps, state, s[0], shrink);
    if (taken && threadIdx.x == 0) shared.drawn = drawn;
    copy_wait<0>();
    clear_tail(shared, round);
    if constexpr (kNew) take_new_values(shared, p, round, token_of(round));
    __syncthreads();
    if (taken) upcoming = shared.drawn;
    value_round(shared, round, shrink, state);
    fetch_values(shared, p, next);
    if (round.ends_segment()) {
      if (next.steps > 0) load_queries<kDim, kNew>(q, p, shared.work, next.segment);
      if (round.segment.count == 1) {
        store_result(p, shared.work.token[round.segment.sequence], round.segment, state);
      } else {
        store_partial(p, round.segment, state);
        if (!p.merge_apart) merge_if_last(shared, p, round.segment);
      }
      state = {};
    }
    round = next;
  }
  if (draws) finish_drawing(p.counters);
}

/// Merges the segments of sequences and KV heads; grid: (KV head, sequence).
template <int kDim>
__global__ void merge_segments(const AttentionParams p) {
  wait_for_inputs();
  const int kv_head = blockIdx.x, b = blockIdx.y, token = p.cu_seqlens_q[b];
  const int count = decode_segments(p, p.cu_seqlens_q[b + 1] - token, p.context_lens[b]);
  if (count < 2) return;  // nothing, or already a result
  merge_rows<kDim>(p, b, kv_head, count, token);
}

}  // namespace

template <int kDim, bool kNew>
void launch_segments(const AttentionParams& p, int blocks, cudaStream_t stream) {
  constexpr int kBytes = sizeof(DecodeShared<kDim>);
  static const cudaError_t ready = cudaFuncSetAttribute(
      decode_attention<kDim, kNew>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  check(ready, "decode_attention: shared memory");
  launch("decode_attention", decode_attention<kDim, kNew>, blocks, kAttentionThreads, kBytes,
         stream, p);
}

template <int kDim>
void launch_decode(const AttentionParams& params, int blocks, cudaStream_t stream) {
  AttentionParams p = params;
  p.merge_apart = merges_apart(p.sequences, p.kv_heads, p.segments, blocks);
  if (p.fresh.qkv != nullptr) {
    launch_segments<kDim, true>(p, blocks, stream);
  } else {
    launch_segments<kDim, false>(p, blocks, stream);
  }
  if (p.segments == 1 || !p.merge_apart) return;
  const int threads = p.group * kDim / 2 < 512 ? ceil_div(p.group * kDim / 2, kWarp) * kWarp : 512;
  launch("merge_segments", merge_segments<kDim>, dim3(p.kv_heads, p.sequences), threads, 0, stream,
         p);
}

template void launch_decode<32>(const AttentionParams&, int, cudaStream_t);
template void launch_decode<64>(const AttentionParams&, int, cudaStream_t);
template void launch_decode<128>(const AttentionParams&, int, cudaStream_t);

}  // namespace fd::cuda

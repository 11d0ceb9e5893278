// Attention of prompt chunks (and of single tokens whose group is wider than a tile): a block has
// 128 rows, its warps 16 each, and streams the keys and values through shared memory. See
// attention.cuh for the arithmetic.
#include "attention.cuh"

namespace fd::cuda {
namespace {

constexpr int kTileRows = kRows * kAttentionWarps;
constexpr int kStages = 3;  // with three, one barrier a step keeps a copy off what is being read

/// Where 16-byte chunk `chunk` of a token's key lies: half a warp reads 32 bytes of four tokens at
/// once, which the turn puts into different banks.
template <int kChunks>
__device__ __forceinline__ int key_at(int token, int chunk) {
  return token * kChunks + (chunk ^ (kChunks >= 8 ? token % 4 : token / 2 % 2) * 2);
}

/// Where chunk `chunk` of a row of transposed values lies: a matrix is one chunk of eight rows.
__device__ __forceinline__ int value_at(int feature, int chunk) {
  return feature * (kBlockTokens / 8) + (chunk ^ feature % 8);
}

/// A step's keys [64][kDim] and transposed values [kDim][64].
template <int kDim>
struct Stage {
  static constexpr int kKeyChunks = kDim / 8;
  static constexpr int kValueChunks = kBlockTokens / 8;
  static constexpr int kChunks = kBlockTokens * kKeyChunks;
  uint4 keys[kChunks];
  uint4 values[kChunks];

  /// Starts the copy of a cache block of one KV head.
  __device__ __forceinline__ void fetch(const AttentionParams& p, int64_t block) {
    const uint4* from_keys = reinterpret_cast<const uint4*>(p.key_cache) + block * kChunks;
    const uint4* from_values = reinterpret_cast<const uint4*>(p.value_cache) + block * kChunks;
#pragma unroll
    for (int i = threadIdx.x; i < kChunks; i += kAttentionThreads) {
      const int to = key_at<kKeyChunks>(i / kKeyChunks, i % kKeyChunks);
      copy_async(&keys[to], from_keys + i, true);
    }
#pragma unroll
    for (int i = threadIdx.x; i < kChunks; i += kAttentionThreads) {
      const int to = value_at(i / kValueChunks, i % kValueChunks);
      copy_async(&values[to], from_values + i, true);
    }
  }

  /// Zeroes the values of the tokens from `count` on.
  __device__ __forceinline__ void clear_from(int count) {
    for (int i = threadIdx.x; i < kChunks; i += kAttentionThreads) {
      uint4& v = values[value_at(i / kValueChunks, i % kValueChunks)];
      v = keep_first(v, count - i % kValueChunks * 8);
    }
  }
};

/// The list is read before the first copy starts; beside the stages it would be more than the 99
/// KiB that a block can have on sm_86.
template <int kDim>
union PrefillShared {
  Stage<kDim> stages[kStages];
  WorkList work;
};

/// A warp's 16 rows: the running softmax of the current segment, and the merge of those before.
template <int kDim>
struct PrefillState {
  static constexpr int kOutTiles = kDim / 8;
  float out[kOutTiles][4] = {};
  float merged[kOutTiles][4] = {};
  float base[2] = {-INFINITY, -INFINITY};
  float total[2] = {};  // the lane's share
  float merged_base[2] = {-INFINITY, -INFINITY};
  float merged_total[2] = {};
  int last[2];  // last position that the row sees; -1: no such row

  /// Merges the segment of each row that `ends`, and empties it.
  __device__ __forceinline__ void end_segment(const bool (&ends)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float sum = row_total(total[r]);
      if (!ends[r]) continue;
      const Shares shares = merge_bases(merged_base[r], base[r]);
      merged_total[r] = merge(merged_total[r], sum, shares);
      base[r] = -INFINITY;
      total[r] = 0.0f;
#pragma unroll
      for (int i = 0; i < kOutTiles; ++i) {
#pragma unroll
        for (int e = 2 * r; e < 2 * r + 2; ++e) {
          merged[i][e] = merge(merged[i][e], out[i][e], shares);
          out[i][e] = 0.0f;
        }
      }
    }
  }
};

/// Attends to the 64 tokens from `position` on; `first_last`: the smallest `last` of the rows.
template <int kDim>
__device__ __forceinline__ void attend(PrefillState<kDim>& state, const Queries<kDim>& q,
                                       const Stage<kDim>& stage, float scale_log2, int position,
                                       int first_last) {
  constexpr int kOutTiles = PrefillState<kDim>::kOutTiles;
  constexpr int kTogether = kOutTiles < 8 ? kOutTiles : 8;
  const int lane = threadIdx.x % kWarp, g = lane / 4, c = lane % 4;
  float s[kHalves][4][4];
  {
    const uint2* keys = reinterpret_cast<const uint2*>(stage.keys);
    auto key = [&](int h, int j, int i) {
      const int token = h * kHalfTokens + 8 * j + g, piece = piece_of(i, c);
      return keys[2 * key_at<Stage<kDim>::kKeyChunks>(token, 2 * i + piece / 2) + piece % 2];
    };
    score<kDim, kHalves>(q, key, s);
  }
  if (position + kBlockTokens - 1 > first_last) {
#pragma unroll
    for (int h = 0; h < kHalves; ++h) mask_half(s[h], position + h * kHalfTokens, state.last);
  }
  float shrink[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float top = row_top(fmaxf(lane_top(s[0], r), lane_top(s[1], r)));
    const float moved = advance_base(state.base[r], top, scale_log2);
    shrink[r] = shrink_of(state.base[r], moved);
    state.base[r] = moved;
  }
  if (__any_sync(kFullMask, shrink[0] != 1.0f || shrink[1] != 1.0f)) {
#pragma unroll
    for (int i = 0; i < kOutTiles; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) state.out[i][e] = __fmul_rn(state.out[i][e], shrink[e / 2]);
    }
  }
  uint32_t a[kHalves][2][4];
  float sum[kHalves][2];
#pragma unroll
  for (int h = 0; h < kHalves; ++h) {
    exponentials(s[h], scale_log2, state.base, sum[h]);
    probabilities(s[h], a[h]);
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    state.total[r] = advance_total(state.total[r], shrink[r], sum[0][r], sum[1][r]);
  }
#pragma unroll
  for (int h = 0; h < kHalves; ++h) {
#pragma unroll
    for (int i0 = 0; i0 < kOutTiles; i0 += kTogether) {
      uint4 v[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        const int row = 8 * (i0 + i) + lane % 8;
        v[i] = load_matrices(&stage.values[value_at(row, 4 * h + lane / 8)]);
      }
#pragma unroll
      for (int i = 0; i < kTogether; ++i) mma(state.out[i0 + i], a[h][0], v[i].x, v[i].y);
#pragma unroll
      for (int i = 0; i < kTogether; ++i) mma(state.out[i0 + i], a[h][1], v[i].z, v[i].w);
    }
  }
}

template <int kDim>
__device__ __forceinline__ void store_rows(const PrefillState<kDim>& state,
                                           bf16* const (&rows)[2]) {
  const int c = threadIdx.x % 4;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (rows[r] == nullptr) continue;
    const float inverse = __frcp_rn(state.merged_total[r]);
#pragma unroll
    for (int i = 0; i < PrefillState<kDim>::kOutTiles; ++i) {
      *reinterpret_cast<uint32_t*>(rows[r] + 8 * i + 2 * c) =
          pack_bf16(normalise(state.merged[i][2 * r], inverse),
                    normalise(state.merged[i][2 * r + 1], inverse));
    }
  }
}

/// grid: (KV head, tile of 128 rows).
template <int kDim>
__global__ void __launch_bounds__(kAttentionThreads, 1) prefill_attention(const AttentionParams p) {
  extern __shared__ uint4 raw[];
  auto& shared = *reinterpret_cast<PrefillShared<kDim>*>(raw);
  wait_for_inputs();
  shared.work.fill(p, [&p](int length, int) {
    return is_decode(p, length) ? 0 : ceil_div(length * p.group, kTileRows);
  });
  const int unit = blockIdx.y, kv_head = blockIdx.x;
  if (unit >= shared.work.total()) return;
  const int b = shared.work.owner(unit), first_token = shared.work.token[b];
  const int length = shared.work.token[b + 1] - first_token, rows = length * p.group;
  const int context = shared.work.context[b], before = context - length;
  // the tiles with the longest contexts first: they would otherwise end after all others
  const int first_row = (shared.work.first[b + 1] - 1 - unit) * kTileRows;
  const int last_row = min(first_row + kTileRows, rows) - 1;
  const int steps = (before + last_row / p.group) / kBlockTokens + 1;
  const int* table = p.block_tables + int64_t{b} * p.table_width;
  __syncthreads();  // the stages take the list's place

  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int warp_row = first_row + warp * kRows;
  PrefillState<kDim> state;
  Queries<kDim> q;
  bf16* to[2];
  {
    const bf16* from[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = warp_row + lane / 4 + 8 * r;
      const bool valid = row < rows;
      const int64_t token = first_token + row / p.group;
      const int64_t at = (token * p.query_heads + kv_head * p.group + row % p.group) * kDim;
      state.last[r] = valid ? before + row / p.group : -1;
      from[r] = valid ? p.q + at : nullptr;
      to[r] = valid ? p.out + at : nullptr;
    }
    q.load(from);
  }
  const int first_last = before + warp_row / p.group;
  const int warp_last = warp_row < rows ? before + (min(warp_row + kRows, rows) - 1) / p.group : -1;
  const int bits[2] = {segment_bits(state.last[0] + 1), segment_bits(state.last[1] + 1)};

  auto fetch = [&](int step) {
    if (step < steps) {
      const int64_t block = __ldg(table + step);
      shared.stages[step % kStages].fetch(p, block * p.kv_heads + kv_head);
    }
    copy_commit();
  };
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) fetch(step);
  for (int step = 0; step < steps; ++step) {
    copy_wait<kStages - 2>();
    __syncthreads();
    fetch(step + kStages - 1);
    const int position = step * kBlockTokens;
    if (context - position < kBlockTokens) {
      shared.stages[step % kStages].clear_from(context - position);
      __syncthreads();
    }
    if (position > warp_last) continue;
    if (position != 0 && position % (1 << kSegmentBits) == 0) {
      const bool ends[2] = {(position & ((1 << bits[0]) - 1)) == 0,
                            (position & ((1 << bits[1]) - 1)) == 0};
      state.end_segment(ends);
    }
    attend(state, q, shared.stages[step % kStages], p.scale_log2, position, first_last);
  }
  state.end_segment({true, true});
  store_rows(state, to);
}

}  // namespace

template <int kDim>
void launch_prefill(const AttentionParams& p, int tokens, cudaStream_t stream) {
  constexpr int kBytes = sizeof(PrefillShared<kDim>);
  static const cudaError_t ready = cudaFuncSetAttribute(
      prefill_attention<kDim>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  check(ready, "prefill_attention: shared memory");
  const dim3 grid(p.kv_heads, tokens * p.group / kTileRows + p.sequences);
  launch("prefill_attention", prefill_attention<kDim>, grid, kAttentionThreads, kBytes, stream, p);
}

template void launch_prefill<32>(const AttentionParams&, int, cudaStream_t);
template void launch_prefill<64>(const AttentionParams&, int, cudaStream_t);
template void launch_prefill<128>(const AttentionParams&, int, cudaStream_t);

}  // namespace fd::cuda

// Attention of prompt chunks on Hopper, head dimension 128: the arithmetic of attention.cuh with
// wgmma, whose sums have the bits of mma.sync's when both take the same 16 features (or tokens) a
// product.
//
// A block has 128 rows: two warpgroups of 64, and a warp that brings keys and values into shared
// memory by bulk tensor copies. Queries stay in registers: read from shared memory, they would take
// as much of its bandwidth as the keys. While the tensor cores multiply one step's probabilities
// with its values, the same warps turn the next step's scores into probabilities. What earlier
// segments came to lies in shared memory; registers have no room for a second output.
#include <cuda.h>

#include "attention.cuh"
#include "ptx/barrier.cuh"
#include "ptx/wgmma.cuh"

namespace fd::cuda {
namespace {

#ifdef FD_SM90A
constexpr int kDim = 128;
constexpr int kGroupThreads = 128;
constexpr int kGroups = 2;
constexpr int kGroupRows = 64;
constexpr int kTileRows = kGroups * kGroupRows;
constexpr int kThreads = (kGroups + 1) * kGroupThreads;
constexpr int kStages = 4;
[[maybe_unused]] constexpr int kPanel =
    64;  // features of a row of keys that one copy brings: 128 bytes
[[maybe_unused]] constexpr int kProducts = kDim / 16;
constexpr int kOutTiles = kDim / 8;
constexpr int kTileBytes = kBlockTokens * kDim * 2;

struct Shared {
  alignas(1024) uint8_t keys[kStages][kTileBytes];    // two panels of [64 tokens][64 features]
  alignas(1024) uint8_t values[kStages][kTileBytes];  // [128 features][64 tokens]
  union {
    float4 merged[kGroups][kOutTiles][kGroupThreads];  // as a thread's registers
    WorkList work;                                     // read before the first segment ends
  };
  uint64_t keys_full[kStages], keys_empty[kStages];
  uint64_t values_full[kStages], values_empty[kStages];
  uint64_t tail_full;  // values of the last step, before the tokens after the context are zeroed
};

struct Maps {
  CUtensorMap keys;
  CUtensorMap values;
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// --- copies

/// Turn of a ring of kStages: which stage, and the parity of its full barrier.
struct Turn {
  int stage = 0;
  int parity = 0;

  __device__ __forceinline__ void next() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// --- products

/// Rows of 128 bytes in the pattern that the copy wrote, eight of them 1,024 bytes apart.
__device__ __forceinline__ uint64_t matrix(const void* p) {
  constexpr uint64_t kSwizzled = uint64_t{1} << 62, kEightRows = uint64_t{1024 >> 4} << 32;
  return kSwizzled | kEightRows | uint64_t{1} << 16 | (shared_address(p) & 0x3ffff) >> 4;
}

__device__ __forceinline__ void score_step(float (&s)[8][4], const uint32_t (&q)[kProducts][4],
                                           const uint8_t* keys) {
  const uint64_t first = matrix(keys);
#pragma unroll
  for (int i = 0; i < kProducts; ++i) {
    // 16 features are 32 bytes; the second panel begins 64 rows of 128 bytes later
    const int at = i / 4 * (kBlockTokens * 128) + i % 4 * 32;
    wgmma_bf16(s, q[i], first + (at >> 4), i > 0);
  }
  wgmma_commit();
}

__device__ __forceinline__ void value_step(float (&out)[kOutTiles][4], const uint32_t (&a)[4][4],
                                           const uint8_t* values) {
  const uint64_t first = matrix(values);
#pragma unroll
  for (int i = 0; i < 4; ++i) wgmma_bf16(out, a[i], first + (i * 32 >> 4));
  wgmma_commit();
}

// --- a warpgroup's rows

/// The running softmax of a thread's two rows in the current segment, and of those before.
struct Softmax {
  float base[2] = {-INFINITY, -INFINITY};
  float total[2] = {};  // the lane's share
  float merged_base[2] = {-INFINITY, -INFINITY};
  float merged_total[2] = {};
  int last[2];  // last position that the row sees; -1: no such row
  int first_last;
};

/// Scores of a step -> exponentials; `shrink`: what outputs and sums before it are multiplied by.
__device__ __forceinline__ void softmax_step(Softmax& state, float (&scores)[8][4],
                                             float scale_log2, int position, float (&shrink)[2]) {
  auto& s = reinterpret_cast<float (&)[kHalves][4][4]>(scores);
  if (position + kBlockTokens - 1 > state.first_last) {
#pragma unroll
    for (int h = 0; h < kHalves; ++h) mask_half(s[h], position + h * kHalfTokens, state.last);
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float top = row_top(fmaxf(lane_top(s[0], r), lane_top(s[1], r)));
    const float moved = advance_base(state.base[r], top, scale_log2);
    shrink[r] = shrink_of(state.base[r], moved);
    state.base[r] = moved;
  }
  float sum[kHalves][2];
#pragma unroll
  for (int h = 0; h < kHalves; ++h) exponentials(s[h], scale_log2, state.base, sum[h]);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    state.total[r] = advance_total(state.total[r], shrink[r], sum[0][r], sum[1][r]);
  }
}

/// Segments that end before a step: which rows' do, and what they came to.
struct Ended {
  bool row[2] = {false, false};
  float base[2];
  float total[2];

  /// Takes the sums of the rows whose segment ends at `position`, and empties them.
  __device__ __forceinline__ void take(Softmax& state, int position, const int (&bits)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float sum = row_total(state.total[r]);
      row[r] = (position & ((1 << bits[r]) - 1)) == 0;
      base[r] = state.base[r];
      total[r] = sum;
      state.base[r] = row[r] ? -INFINITY : state.base[r];
      state.total[r] = row[r] ? 0.0f : state.total[r];
    }
  }
};

__device__ __forceinline__ float4 merge_tile(const float4& held, const float (&out)[4],
                                             const Shares (&shares)[2]) {
  return make_float4(merge(held.x, out[0], shares[0]), merge(held.y, out[1], shares[0]),
                     merge(held.z, out[2], shares[1]), merge(held.w, out[3], shares[1]));
}

/// Merges the outputs of segments that ended, and empties them.
__device__ __forceinline__ void merge_ended(Softmax& state, const Ended& ended,
                                            float (&out)[kOutTiles][4],
                                            float4 (*merged)[kGroupThreads]) {
  const int thread = threadIdx.x % kGroupThreads;
  if (!__any_sync(kFullMask, ended.row[0] || ended.row[1])) return;
  Shares shares[2] = {{1.0f, 0.0f}, {1.0f, 0.0f}};  // of a row whose segment goes on: no change
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (!ended.row[r]) continue;
    shares[r] = merge_bases(state.merged_base[r], ended.base[r]);
    state.merged_total[r] = merge(state.merged_total[r], ended.total[r], shares[r]);
  }
#pragma unroll
  for (int i = 0; i < kOutTiles; ++i) {
    merged[i][thread] = merge_tile(merged[i][thread], out[i], shares);
#pragma unroll
    for (int e = 0; e < 4; ++e) out[i][e] = ended.row[e / 2] ? 0.0f : out[i][e];
  }
}

/// Merges the last segments and stores the rows.
__device__ __forceinline__ void store_rows(Softmax& state, const float (&out)[kOutTiles][4],
                                           const float4 (*merged)[kGroupThreads],
                                           bf16* const (&rows)[2]) {
  const int thread = threadIdx.x % kGroupThreads, c = thread % 4;
  Shares shares[2];
  float inverse[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float sum = row_total(state.total[r]);
    shares[r] = merge_bases(state.merged_base[r], state.base[r]);
    inverse[r] = __frcp_rn(merge(state.merged_total[r], sum, shares[r]));
  }
#pragma unroll
  for (int i = 0; i < kOutTiles; ++i) {
    const float4 value = merge_tile(merged[i][thread], out[i], shares);
    const uint32_t pair[2] = {
        pack_bf16(normalise(value.x, inverse[0]), normalise(value.y, inverse[0])),
        pack_bf16(normalise(value.z, inverse[1]), normalise(value.w, inverse[1]))};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (rows[r] != nullptr) *reinterpret_cast<uint32_t*>(rows[r] + 8 * i + 2 * c) = pair[r];
    }
  }
}

/// One warp: brings the keys and values of all steps, a step's keys before the values of the last.
__device__ __forceinline__ void produce(Shared& shared, const Maps& maps, const int* table,
                                        int kv_heads, int kv_head, int steps, int context) {
  const int lane = threadIdx.x % kWarp;
  Turn turn;
  for (int step = 0; step < steps; ++step, turn.next()) {
    const int stage = turn.stage, row = table[step] * kv_heads + kv_head;
    const int count = context - step * kBlockTokens;
    uint8_t* keys = shared.keys[stage];
    uint8_t* values = shared.values[stage];
    barrier_wait(shared_address(&shared.keys_empty[stage]), turn.parity ^ 1);
    if (lane == 0) {
      barrier_expect(shared_address(&shared.keys_full[stage]), kTileBytes);
      tensor_copy(shared_address(keys), &maps.keys, 0, row * kBlockTokens,
                  shared_address(&shared.keys_full[stage]));
      tensor_copy(shared_address(keys + kTileBytes / 2), &maps.keys, kPanel, row * kBlockTokens,
                  shared_address(&shared.keys_full[stage]));
    }
    barrier_wait(shared_address(&shared.values_empty[stage]), turn.parity ^ 1);
    uint64_t& full = count < kBlockTokens ? shared.tail_full : shared.values_full[stage];
    if (lane == 0) {
      barrier_expect(shared_address(&full), kTileBytes);
      tensor_copy(shared_address(values), &maps.values, 0, row * kDim, shared_address(&full));
    }
    if (count >= kBlockTokens) continue;
    barrier_wait(shared_address(&shared.tail_full), 0);
    for (int i = lane; i < kDim * 8; i += kWarp) {
      const int feature = i / 8, chunk = i % 8;
      uint4& v = reinterpret_cast<uint4*>(values)[feature * 8 + (chunk ^ feature % 8)];
      if (count < 8 * chunk + 8) v = keep_first(v, count - 8 * chunk);
    }
    fence_async();
    __syncwarp();
    if (lane == 0) barrier_arrive(shared_address(&shared.values_full[stage]));
  }
}

/// Frees a stage for the next copy; every warp of the consumers does.
__device__ __forceinline__ void release(uint64_t& empty) {
  if (threadIdx.x % kWarp == 0) barrier_arrive(shared_address(&empty));
}

/// Queries of rows lane / 4 and lane / 4 + 8 as matrix A, in wgmma's order of features.
__device__ __forceinline__ void load_queries(uint32_t (&q)[kProducts][4],
                                             const bf16* const (&rows)[2]) {
  const int c = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < kProducts; ++i) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const auto* from = reinterpret_cast<const uint32_t*>(rows[r] + 16 * i) + c;
      q[i][r] = rows[r] != nullptr ? from[0] : 0u;
      q[i][r + 2] = rows[r] != nullptr ? from[4] : 0u;
    }
  }
}

/// A warpgroup's rows over `steps` steps; `all` are the block's, which it has to free.
__device__ __forceinline__ void consume(Shared& shared, Softmax& state,
                                        const uint32_t (&q)[kProducts][4], float scale_log2,
                                        int steps, int all, bf16* const (&to)[2]) {
  const int group = threadIdx.x / kGroupThreads - 1;
  float4(*merged)[kGroupThreads] = shared.merged[group];
  const int bits[2] = {segment_bits(state.last[0] + 1), segment_bits(state.last[1] + 1)};
  float out[kOutTiles][4] = {}, s[8][4], shrink[2] = {1.0f, 1.0f};
  uint32_t a[4][4];
#pragma unroll
  for (int i = 0; i < kOutTiles; ++i) {
    merged[i][threadIdx.x % kGroupThreads] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  }
  Ended ended;
  Turn turn;
  auto take_probabilities = [&] {
    const auto& exponents = reinterpret_cast<const float (&)[kHalves][4][4]>(s);
    auto& both = reinterpret_cast<uint32_t (&)[kHalves][2][4]>(a);
#pragma unroll
    for (int h = 0; h < kHalves; ++h) probabilities(exponents[h], both[h]);
  };
  auto ends_before = [](int step) {  // whether a segment may
    return step > 0 && step % ((1 << kSegmentBits) / kBlockTokens) == 0;
  };
  auto wait_for_output = [&] {
    wgmma_wait<0>();
    pin(out);
  };
  if (steps > 0) {
    barrier_wait(shared_address(&shared.keys_full[0]), 0);
    wgmma_fence();
    score_step(s, q, shared.keys[0]);
    wgmma_wait<0>();
    pin(s);
    release(shared.keys_empty[0]);
    softmax_step(state, s, scale_log2, 0, shrink);
    for (int step = 1; step < steps; ++step) {
      const Turn before = turn;
      turn.next();
      const int position = step * kBlockTokens;
      take_probabilities();
      barrier_wait(shared_address(&shared.keys_full[turn.stage]), turn.parity);
      barrier_wait(shared_address(&shared.values_full[before.stage]), before.parity);
      wgmma_fence();
      score_step(s, q, shared.keys[turn.stage]);
      if (ends_before(step - 1)) {  // beside the scores' products
        merge_ended(state, ended, out, merged);
        wgmma_fence();
      }
      value_step(out, a, shared.values[before.stage]);
      wgmma_wait<1>();
      pin(s);
      release(shared.keys_empty[turn.stage]);
      if (ends_before(step)) ended.take(state, position, bits);
      softmax_step(state, s, scale_log2, position, shrink);
      // A branch before the wait: without one the assembler waits before it computes exponentials.
      if (__any_sync(kFullMask, shrink[0] != 1.0f || shrink[1] != 1.0f)) {
        wait_for_output();
#pragma unroll
        for (int i = 0; i < kOutTiles; ++i) {
#pragma unroll
          for (int e = 0; e < 4; ++e) out[i][e] = __fmul_rn(out[i][e], shrink[e / 2]);
        }
      } else {
        wait_for_output();
      }
      release(shared.values_empty[before.stage]);
    }
    take_probabilities();
    if (ends_before(steps - 1)) merge_ended(state, ended, out, merged);
    barrier_wait(shared_address(&shared.values_full[turn.stage]), turn.parity);
    wgmma_fence();
    value_step(out, a, shared.values[turn.stage]);
    wait_for_output();
    release(shared.values_empty[turn.stage]);
    store_rows(state, out, merged, to);
    turn.next();
  }
  for (int step = steps; step < all; ++step, turn.next()) {
    barrier_wait(shared_address(&shared.keys_full[turn.stage]), turn.parity);
    release(shared.keys_empty[turn.stage]);
    barrier_wait(shared_address(&shared.values_full[turn.stage]), turn.parity);
    release(shared.values_empty[turn.stage]);
  }
}
#endif  // __CUDA_ARCH_FEAT_SM90_ALL

/// grid: (KV head, tile of 128 rows).
__global__ void __launch_bounds__(kThreads, 1)
    prefill_attention_sm90(const AttentionParams p, const __grid_constant__ Maps maps) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ uint8_t raw[];
  Shared& shared =
      *reinterpret_cast<Shared*>((reinterpret_cast<uintptr_t>(raw) + 1023) & ~uintptr_t{1023});
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
  auto steps_upto = [&](int row) {
    return (before + (min(row, rows) - 1) / p.group) / kBlockTokens + 1;
  };
  const int all = steps_upto(first_row + kTileRows);
  const int* table = p.block_tables + int64_t{b} * p.table_width;
  if (threadIdx.x == 0) {
    constexpr int kConsumers = kGroups * kGroupThreads / kWarp;
    for (int i = 0; i < kStages; ++i) {
      barrier_init(shared_address(&shared.keys_full[i]), 1);
      barrier_init(shared_address(&shared.values_full[i]), 1);
      barrier_init(shared_address(&shared.keys_empty[i]), kConsumers);
      barrier_init(shared_address(&shared.values_empty[i]), kConsumers);
    }
    barrier_init(shared_address(&shared.tail_full), 1);
    barrier_publish();
  }
  __syncthreads();  // outputs take the list's place

  if (threadIdx.x < kGroupThreads) {
    give_registers<40>();
    if (threadIdx.x < kWarp) produce(shared, maps, table, p.kv_heads, kv_head, all, context);
  } else {
    take_registers<232>();
    const int thread = threadIdx.x - kGroupThreads, lane = thread % kWarp;
    const int group_row = first_row + thread / kGroupThreads * kGroupRows;
    const int warp_row = group_row + thread % kGroupThreads / kWarp * kRows;
    Softmax state;
    const bf16* from[2];
    bf16* to[2];
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
    state.first_last = before + warp_row / p.group;
    uint32_t q[kProducts][4];
    load_queries(q, from);
    const int steps = group_row < rows ? steps_upto(group_row + kGroupRows) : 0;
    consume(shared, state, q, p.scale_log2, steps, all, to);
  }
#endif
}

// --- host

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

EncodeTiled encode_tiled() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result{};
  check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault,
                                         &result),
        "prefill_attention: cuTensorMapEncodeTiled");
  if (found == nullptr) {
    throw std::runtime_error("prefill_attention: the driver has no cuTensorMapEncodeTiled");
  }
  return reinterpret_cast<EncodeTiled>(found);
}

/// Rows of `width` bf16, of which a copy takes 64 columns of `box_rows`.
CUtensorMap tensor_map(const bf16* data, int width, int64_t rows, int box_rows) {
  static const EncodeTiled encode = encode_tiled();
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(width), static_cast<cuuint64_t>(rows)};
  const cuuint64_t pitch[1] = {static_cast<cuuint64_t>(width) * 2};
  const cuuint32_t box[2] = {64, static_cast<cuuint32_t>(box_rows)}, steps[2] = {1, 1};
  CUtensorMap map;
  const CUresult status =
      encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<bf16*>(data), sizes, pitch, box,
             steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    throw std::runtime_error("prefill_attention: cuTensorMapEncodeTiled failed with " +
                             std::to_string(static_cast<int>(status)));
  }
  return map;
}

#endif  // FD_SM90A

}  // namespace

void launch_prefill_sm90(const AttentionParams& p, int num_blocks, int tokens,
                         cudaStream_t stream) {
#ifdef FD_SM90A
  constexpr int kBytes = sizeof(Shared) + 1024;
  static const cudaError_t ready = cudaFuncSetAttribute(
      prefill_attention_sm90, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  check(ready, "prefill_attention: shared memory");
  const int64_t heads = int64_t{num_blocks} * p.kv_heads;
  const Maps maps{tensor_map(p.key_cache, kDim, heads * kBlockTokens, kBlockTokens),
                  tensor_map(p.value_cache, kBlockTokens, heads * kDim, kDim)};
  const dim3 grid(p.kv_heads, tokens * p.group / kTileRows + p.sequences);
  launch("prefill_attention", prefill_attention_sm90, grid, kThreads, kBytes, stream, p, maps);
#else
  (void)p, (void)num_blocks, (void)tokens, (void)stream;
  throw std::runtime_error("prefill_attention: this build has no code for Hopper");
#endif
}

}  // namespace fd::cuda

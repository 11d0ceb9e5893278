// The search for bytes and what surrounds it, a column or a group of 64 rows at a time.
#include "encode.h"
#include "exact.cuh"

namespace fd::cuda {
namespace {

constexpr int kLossThreads = 128;
constexpr int kLossColumns = 4;  // of a thread: they share the codewords that are read
constexpr int kSearchWarps = 4;
constexpr int kOwn = kCodewords / kWarp;  // codewords of a lane
constexpr int kMaxTrials = 3;

__device__ __forceinline__ void load_metric(const float* metric, float4 (&rows)[kCodeRows]) {
  for (int i = 0; i < kCodeRows; ++i) rows[i] = reinterpret_cast<const float4*>(metric)[i];
}

__global__ void __launch_bounds__(kCodewords)
    half_squares_kernel(const float4* books, const float* metric, int blocks, float* half) {
  const int code = blockIdx.y, block = blockIdx.x, byte = threadIdx.x;
  float4 m[kCodeRows];
  load_metric(metric + 16 * block, m);
  const float4 c = books[code * kCodewords + byte];
  const float own[kCodeRows] = {c.x, c.y, c.z, c.w};
  float sum = 0.0f;
  for (int k = 0; k < kCodeRows; ++k) sum = __fmaf_rn(dot4(m[k], c), own[k], sum);
  half[(static_cast<int64_t>(code) * blocks + block) * kCodewords + byte] = __fmul_rn(sum, 0.5f);
}

__global__ void __launch_bounds__(kLossThreads) plain_losses_kernel(PlainLosses p) {
  __shared__ float4 book[kCodewords];
  __shared__ float half[kGroupBlocks * kCodewords];
  const int trial = blockIdx.z, group = blockIdx.y;
  const int code = p.first_code + trial * p.code_step;
  for (int i = threadIdx.x; i < kCodewords; i += kLossThreads) {
    book[i] = p.books[code * kCodewords + i];
  }
  const float* halves = p.half + code * p.half_code + group * kGroupBlocks * p.half_block;
  for (int i = threadIdx.x; i < kGroupBlocks * kCodewords; i += kLossThreads) {
    half[i] = halves[i / kCodewords * p.half_block + i % kCodewords];
  }
  __syncthreads();
  const int64_t rows = static_cast<int64_t>(p.groups) * kGroupRows;
  const float* weight[kLossColumns];
  float scale[kLossColumns], loss[kLossColumns];
  for (int i = 0; i < kLossColumns; ++i) {
    const int n = (blockIdx.x * kLossColumns + i) * kLossThreads + threadIdx.x;
    const int64_t column = n < p.columns ? n : p.columns - 1;
    weight[i] = p.weight + column * rows + group * kGroupRows;
    scale[i] = p.scale[trial * p.scale_step + column * p.groups + group];
    loss[i] = 0.0f;
  }
  for (int b = 0; b < kGroupBlocks; ++b) {
    float4 metric[kCodeRows], u[kLossColumns];
    float best[kLossColumns], shift[kLossColumns];
    load_metric(p.metric + (group * kGroupBlocks + b) * p.metric_block, metric);
    for (int i = 0; i < kLossColumns; ++i) {
      const float4 x = reinterpret_cast<const float4*>(weight[i])[b];
      u[i] = apply_metric(metric, x);
      shift[i] = dot4(x, u[i]);
      best[i] = -__int_as_float(0x7f800000);
    }
#pragma unroll 8
    for (int byte = 0; byte < kCodewords; ++byte) {
      const float4 c = book[byte];
      const float h = half[b * kCodewords + byte];
      for (int i = 0; i < kLossColumns; ++i) {
        best[i] = fmaxf(score_of(u[i], c, h, -scale[i]), best[i]);
      }
    }
    for (int i = 0; i < kLossColumns; ++i) {
      const float gain = __fmul_rn(__fmul_rn(2.0f, scale[i]), best[i]);
      loss[i] = __fadd_rn(loss[i], __fsub_rn(shift[i], gain));
    }
  }
  for (int i = 0; i < kLossColumns; ++i) {
    const int n = (blockIdx.x * kLossColumns + i) * kLossThreads + threadIdx.x;
    if (n < p.columns) {
      p.losses[(static_cast<int64_t>(trial) * p.columns + n) * p.groups + group] = loss[i];
    }
  }
}

/// Ordered as the floats are; equal for both zeros.
__device__ __forceinline__ uint32_t sort_key(float value) {
  const uint32_t bits = __float_as_uint(__fadd_rn(value, 0.0f));
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float of_sort_key(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

struct Room {
  float target[kMaxTrials][kGroupRows];
  float error[kMaxTrials][kGroupRows];
  float weight[kGroupRows];
  float before[kGroupRows];
};

__device__ __forceinline__ float4 four(const float* values, int block) {
  return reinterpret_cast<const float4*>(values)[block];
}

/// Weights, targets and standing errors of a column's group into shared memory. A descent's targets
/// are the best values given all other blocks.
template <bool kDescent>
__device__ void fill_room(const GroupSearch& s, int64_t at, int group, int lane, int trials,
                          Room& room) {
  for (int r = lane; r < kGroupRows; r += kWarp) {
    room.weight[r] = s.weight[at + r];
    if constexpr (kDescent) {
      room.before[r] = s.error[at + r];
      const float* inverse = s.inverse + (group * kGroupBlocks + r / kCodeRows) * 16;
      float sum = 0.0f;
      for (int k = 0; k < kCodeRows; ++k) {
        sum = __fmaf_rn(s.product[at + r / kCodeRows * kCodeRows + k],
                        inverse[k * kCodeRows + r % kCodeRows], sum);
      }
      const float target = __fadd_rn(room.weight[r], __fsub_rn(sum, room.before[r]));
      for (int t = 0; t < trials; ++t) room.target[t][r] = target;
    } else {
      for (int t = 0; t < trials; ++t) room.target[t][r] = s.target[at + r];
    }
  }
}

/// One warp: the bytes of one group of one column, every lane eight codewords.
template <int kTrials, bool kDescent, bool kFeedback>
__global__ void __launch_bounds__(kSearchWarps* kWarp) search_groups_kernel(GroupSearch s) {
  __shared__ Room rooms[kSearchWarps];
  const int lane = threadIdx.x % kWarp;
  const int64_t work = static_cast<int64_t>(blockIdx.x) * kSearchWarps + threadIdx.x / kWarp;
  if (work >= static_cast<int64_t>(s.columns) * s.groups) return;
  const int n = static_cast<int>(work / s.groups);
  const int part = static_cast<int>(work % s.groups), group = s.first_group + part;
  const int64_t rows = static_cast<int64_t>(s.all_groups) * kGroupRows;
  const int64_t at = n * rows + group * kGroupRows;
  Room& room = rooms[threadIdx.x / kWarp];
  fill_room<kDescent>(s, at, group, lane, kTrials, room);
  const int code = s.code[n];
  const float4* book = s.books + code * kCodewords;
  const float* half = s.half + code * s.half_code + group * kGroupBlocks * s.half_block + lane;
  const float* feedback = kFeedback ? s.feedback : nullptr;
  float4 c[kOwn];
  for (int j = 0; j < kOwn; ++j) c[j] = book[j * kWarp + lane];
  const int middle = s.local[static_cast<int64_t>(n) * s.all_groups + group];
  int local[kTrials], bytes[kTrials];
  float scale[kTrials], loss[kTrials];
  for (int t = 0; t < kTrials; ++t) {
    const int step = t == 1 ? -1 : t == 2 ? 1 : 0;
    local[t] = max(0, min(kMaxLocal, middle + step));
    scale[t] = __fmul_rn(static_cast<float>(local[t]), s.super_scale[n]);
    loss[t] = 0.0f;
    bytes[t] = 0;
  }
  __syncwarp();
  for (int b = 0; b < kGroupBlocks; ++b) {
    float4 metric[kCodeRows];
    load_metric(s.metric + (group * kGroupBlocks + b) * s.metric_block, metric);
    float h[kOwn];
    for (int j = 0; j < kOwn; ++j) h[j] = half[b * s.half_block + j * kWarp];
    float move[2][kCodeRows];
    if constexpr (kFeedback) {
      for (int k = 0; k < kCodeRows; ++k) {
        const float* row = feedback + (b * kCodeRows + k) * s.feedback_stride + lane;
        move[0][k] = row[0];
        move[1][k] = row[kWarp];
      }
    }
    const float4 weight = four(room.weight, b);
#pragma unroll
    for (int t = 0; t < kTrials; ++t) {
      const float4 target = four(room.target[t], b);
      const float4 u = apply_metric(metric, target);
      float score[kOwn], best;
      for (int j = 0; j < kOwn; ++j) {
        score[j] = score_of(u, c[j], h[j], -scale[t]);
        best = j == 0 ? score[0] : fmaxf(score[j], best);
      }
      const float top = of_sort_key(__reduce_max_sync(kFullMask, sort_key(best)));
      uint32_t own = kCodewords - 1;
      for (int j = kOwn - 1; j >= 0; --j) {
        if (score[j] == top) own = j * kWarp + lane;
      }
      const int byte = static_cast<int>(__reduce_min_sync(kFullMask, own));
      if (lane == b) bytes[t] = byte;
      const float gain = __fmul_rn(__fmul_rn(2.0f, scale[t]), top);
      loss[t] = __fadd_rn(loss[t], __fsub_rn(dot4(target, u), gain));
      const float4 found = book[byte];
      float4 error;
      error.x = __fsub_rn(weight.x, __fmul_rn(scale[t], found.x));
      error.y = __fsub_rn(weight.y, __fmul_rn(scale[t], found.y));
      error.z = __fsub_rn(weight.z, __fmul_rn(scale[t], found.z));
      error.w = __fsub_rn(weight.w, __fmul_rn(scale[t], found.w));
      float4 change = error;
      if constexpr (kDescent) {
        const float4 before = four(room.before, b);
        float4 old;
        old.x = __fadd_rn(__fsub_rn(target.x, weight.x), before.x);
        old.y = __fadd_rn(__fsub_rn(target.y, weight.y), before.y);
        old.z = __fadd_rn(__fsub_rn(target.z, weight.z), before.z);
        old.w = __fadd_rn(__fsub_rn(target.w, weight.w), before.w);
        loss[t] = __fsub_rn(loss[t], dot4(old, apply_metric(metric, old)));
        change.x = __fsub_rn(error.x, before.x);
        change.y = __fsub_rn(error.y, before.y);
        change.z = __fsub_rn(error.z, before.z);
        change.w = __fsub_rn(error.w, before.w);
      }
      __syncwarp();  // all have read the targets of this block
      if (lane == 0) reinterpret_cast<float4*>(room.error[t])[b] = error;
      if constexpr (kFeedback) {
        for (int i = 0; i < 2; ++i) {
          const int r = i * kWarp + lane;
          if (r >= (b + 1) * kCodeRows) {
            float moved = room.target[t][r];
            moved = __fmaf_rn(change.x, move[i][0], moved);
            moved = __fmaf_rn(change.y, move[i][1], moved);
            moved = __fmaf_rn(change.z, move[i][2], moved);
            room.target[t][r] = __fmaf_rn(change.w, move[i][3], moved);
          }
        }
      }
    }
    __syncwarp();
  }
  int best = 0;
  for (int t = 1; t < kTrials; ++t) {
    if (loss[t] < loss[best]) best = t;
  }
  if (lane == 0 && s.loss) s.loss[static_cast<int64_t>(n) * s.groups + part] = loss[best];
  const bool take = !kDescent || loss[best] < 0.0f;
  if (take) {
    if (lane < kGroupBlocks) {
      s.packed[n * (rows / kCodeRows) + group * kGroupBlocks + lane] =
          static_cast<uint8_t>(bytes[best]);
    }
    if (lane == 0) {
      s.local[static_cast<int64_t>(n) * s.all_groups + group] = static_cast<uint8_t>(local[best]);
    }
  }
  for (int r = lane; r < kGroupRows; r += kWarp) {
    const float error = room.error[best][r];
    if (take) s.error[at + r] = error;
    if (kDescent) {
      s.change[static_cast<int64_t>(n) * kGroupRows + r] =
          take ? __fsub_rn(error, room.before[r]) : 0.0f;
    }
  }
}

template <int kTrials>
void launch_search(const GroupSearch& s, cudaStream_t stream) {
  const int64_t work = static_cast<int64_t>(s.columns) * s.groups;
  const dim3 grid(static_cast<unsigned>(ceil_div<int64_t>(work, kSearchWarps)));
  const auto kernel = s.product    ? search_groups_kernel<kTrials, true, true>
                      : s.feedback ? search_groups_kernel<kTrials, false, true>
                                   : search_groups_kernel<kTrials, false, false>;
  queue("search_groups", kernel, grid, kSearchWarps * kWarp, stream, s);
}

}  // namespace

void half_squares(const float4* books, int codes, const float* metric, int blocks, float* half,
                  cudaStream_t stream) {
  queue("half_squares", half_squares_kernel, dim3(blocks, codes), kCodewords, stream, books, metric,
        blocks, half);
}

void plain_losses(const PlainLosses& call, cudaStream_t stream) {
  const dim3 grid(ceil_div(call.columns, kLossThreads * kLossColumns), call.groups, call.count);
  queue("plain_losses", plain_losses_kernel, grid, kLossThreads, stream, call);
}

void search_groups(const GroupSearch& search, cudaStream_t stream) {
  if (search.trials == 1) {
    launch_search<1>(search, stream);
  } else {
    launch_search<kMaxTrials>(search, stream);
  }
}

}  // namespace fd::cuda

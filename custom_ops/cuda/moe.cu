// Routing, sorting by expert and weighted recombination of a mixture of experts.
#include "common.cuh"
#include "gemm/route_shape.h"
#include "ops.h"

namespace fd::cuda {
namespace {

constexpr int kRouteThreads = 256;
constexpr int kMaxExperts = 1024;
constexpr int kSelectSums = 4096;  // group sums that route_select holds at once

/// A logit is the sum of its groups in order, a group the sum of its pieces in order, a piece the
/// sum of 64 products in order, whichever blocks computed them: the choice of experts must not
/// depend on how many tokens are routed together.
///
/// partial[i, t, e] = x[t, :] * gate[:, e] over the i-th run of `run` pieces (one piece, one group,
/// or all), float32: the router decides, so its logits are not rounded to bf16 anywhere. 16 tokens
/// x 64 experts a block; a thread has 4 tokens of one expert.
__global__ void route_logits(const bf16* x, const float* gate, float* partial, int tokens,
                             int hidden, int experts, int run) {
  __shared__ float x_tile[kRouteTokens][kRouteDepth];
  __shared__ float gate_tile[kRouteDepth][kRouteExperts];
  wait_for_inputs();
  const int t0 = blockIdx.x * kRouteTokens, split = blockIdx.y, e0 = blockIdx.z * kRouteExperts;
  const int e = threadIdx.x % kRouteExperts, group = threadIdx.x / kRouteExperts;
  const int begin = split * run * kPieceRows, end = min(begin + run * kPieceRows, hidden);
  float acc[4] = {}, group_sum[4] = {}, total[4] = {};
  for (int k0 = begin; k0 < end; k0 += kRouteDepth) {
    for (int i = threadIdx.x; i < kRouteTokens * kRouteDepth; i += kRouteThreads) {
      const int t = t0 + i / kRouteDepth, k = k0 + i % kRouteDepth;
      x_tile[i / kRouteDepth][i % kRouteDepth] =
          t < tokens && k < end ? __bfloat162float(x[int64_t{t} * hidden + k]) : 0.0f;
    }
    for (int i = threadIdx.x; i < kRouteDepth * kRouteExperts; i += kRouteThreads) {
      const int k = k0 + i / kRouteExperts, column = e0 + i % kRouteExperts;
      gate_tile[i / kRouteExperts][i % kRouteExperts] =
          k < end && column < experts ? __ldg(gate + int64_t{k} * experts + column) : 0.0f;
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kRouteDepth; ++k) {
      const float w = gate_tile[k][e];
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[i] = __fmaf_rn(x_tile[group * 4 + i][k], w, acc[i]);
    }
    __syncthreads();
    const int done = k0 + kRouteDepth;
    const bool piece_ends = done % kPieceRows == 0 || done >= end;
    const bool group_ends = done % (kGroupPieces * kPieceRows) == 0 || done >= end;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (piece_ends) {
        group_sum[i] += acc[i];
        acc[i] = 0.0f;
      }
      if (group_ends) {
        total[i] += group_sum[i];
        group_sum[i] = 0.0f;
      }
    }
  }
  if (e0 + e >= experts) return;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int t = t0 + group * 4 + i;
    if (t < tokens) partial[(int64_t{split} * tokens + t) * experts + e0 + e] = total[i];
  }
}

/// Logits of one token from `count` partial sums, of which `per_group` make a group: p[e].
__device__ __forceinline__ void add_groups(const float* partial, int count, int per_group,
                                           int tokens, int experts, float* sums, float* p) {
  const int groups = (count + per_group - 1) / per_group;
  const int at_once = max(1, kSelectSums / experts);
  for (int first = 0; first < groups; first += at_once) {
    const int here = min(at_once, groups - first);
    for (int i = threadIdx.x; i < here * experts; i += blockDim.x) {
      const int e = i % experts, begin = (first + i / experts) * per_group;
      const int end = min(begin + per_group, count);
      float sum = 0.0f;
#pragma unroll 4
      for (int s = begin; s < end; ++s) {
        sum += partial[(int64_t{s} * tokens + blockIdx.x) * experts + e];
      }
      sums[i] = sum;
    }
    __syncthreads();
    for (int e = threadIdx.x; e < experts; e += blockDim.x) {
      float logit = first == 0 ? 0.0f : p[e];
      for (int g = 0; g < here; ++g) logit += sums[g * experts + e];
      p[e] = logit;
    }
    __syncthreads();
  }
}

/// Softmax over all experts and choice of the top k by p + bias; equal scores go to the lower id.
/// One block a token: all threads add the partial sums, the first warp does the rest.
__global__ void route_select(const float* partial, const float* bias, int count, int per_group,
                             int* ids, float* weights, int tokens, int experts, int top_k) {
  wait_for_inputs();
  extern __shared__ float memory[];
  float* p = memory;           // [experts]
  float* score = p + experts;  // [experts]
  float* sums = score + experts;
  const int t = blockIdx.x;
  add_groups(partial, count, per_group, tokens, experts, sums, p);
  if (threadIdx.x >= kWarp) return;
  const int lane = threadIdx.x;
  float top = -INFINITY;
  for (int e = lane; e < experts; e += kWarp) top = fmaxf(top, p[e]);
  top = warp_max(top);
  float total = 0.0f;
  for (int e = lane; e < experts; e += kWarp) {
    p[e] = expf(p[e] - top);
    total += p[e];
  }
  total = warp_sum(total);
  for (int e = lane; e < experts; e += kWarp) {
    p[e] /= total;
    score[e] = p[e] + (bias != nullptr ? bias[e] : 0.0f);
  }
  __syncwarp();  // any lane reads the weight of the chosen expert
  float chosen_sum = 0.0f;
  float mine = 0.0f;
  for (int j = 0; j < top_k; ++j) {
    // NaN compares false everywhere: the lowest free id wins then, so an id is always valid and
    // used once
    int best = experts;
    float best_score = 0.0f;
    for (int e = lane; e < experts; e += kWarp) {
      if (score[e] == -INFINITY && p[e] < 0.0f) continue;  // taken
      if (best == experts || score[e] > best_score) {
        best = e;
        best_score = score[e];
      }
    }
    for (int offset = 16; offset > 0; offset >>= 1) {
      const int other = __shfl_xor_sync(kFullMask, best, offset);
      const float other_score = __shfl_xor_sync(kFullMask, best_score, offset);
      const bool better = other_score > best_score || (!(other_score < best_score) && other < best);
      if (other < experts && (best == experts || better)) {
        best = other;
        best_score = other_score;
      }
    }
    best = __shfl_sync(kFullMask, best, 0);
    const float weight = p[best];
    __syncwarp();
    if (lane == 0) {
      ids[int64_t{t} * top_k + j] = best;
      score[best] = -INFINITY;
      p[best] = -1.0f;
    }
    __syncwarp();
    chosen_sum += weight;
    if (lane == j) mine = weight;
  }
  if (lane < top_k) weights[int64_t{t} * top_k + lane] = mine / fmaxf(chosen_sum, 1e-12f);
}

/// One block: counts, offsets and tile list in shared memory. The order of rows inside an expert is
/// free: a row's result depends on nothing but the row.
__global__ void align_kernel(const int* ids, int slots, int experts, int tile_rows, int max_tiles,
                             int* slot_of_row, int4* tiles) {
  wait_for_inputs();
  __shared__ int count[kMaxExperts], cursor[kMaxExperts];
  __shared__ int tile_total;
  for (int e = threadIdx.x; e < experts; e += blockDim.x) count[e] = 0;
  if (threadIdx.x == 0) tile_total = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < slots; i += blockDim.x) atomicAdd(&count[ids[i]], 1);
  __syncthreads();
  for (int e = threadIdx.x; e < experts; e += blockDim.x) {
    int rows = 0, tile = 0;
    for (int other = 0; other < e; ++other) {
      rows += count[other];
      tile += (count[other] + tile_rows - 1) / tile_rows;
    }
    cursor[e] = rows;
    for (int done = 0; done < count[e]; done += tile_rows, ++tile) {
      tiles[tile] = make_int4(e, rows + done, min(tile_rows, count[e] - done), 0);
    }
    if (e == experts - 1) tile_total = tile;
  }
  __syncthreads();
  for (int i = tile_total + threadIdx.x; i < max_tiles; i += blockDim.x) {
    tiles[i] = make_int4(0, 0, 0, 0);
  }
  for (int i = threadIdx.x; i < slots; i += blockDim.x) {
    slot_of_row[atomicAdd(&cursor[ids[i]], 1)] = i;
  }
}

__global__ void combine_kernel(const bf16* y, const float* weights, bf16* out, int top_k,
                               int hidden, int64_t pairs) {
  wait_for_inputs();
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= pairs) return;
  const int per_row = hidden / 2;
  const int64_t t = i / per_row;
  const int at = static_cast<int>(i % per_row);
  const uint32_t* rows = reinterpret_cast<const uint32_t*>(y) + t * top_k * per_row + at;
  float low = 0.0f, high = 0.0f;
  for (int j = 0; j < top_k; ++j) {
    const float w = weights[t * top_k + j];
    const float2 v = unpack_bf16(rows[int64_t{j} * per_row]);
    low = __fmaf_rn(w, v.x, low);  // as the persistent kernel of experts does
    high = __fmaf_rn(w, v.y, high);
  }
  reinterpret_cast<uint32_t*>(out)[i] = pack_bf16(low, high);
}

}  // namespace

void route(const bf16* x, const float* gate, const float* bias, float* partial,
           const RoutePlan& plan, int* ids, float* weights, int tokens, int hidden, int experts,
           int top_k, cudaStream_t stream) {
  if (experts > kMaxExperts || top_k > kWarp || top_k > experts) {
    throw std::runtime_error("route: " + std::to_string(experts) + " experts and top " +
                             std::to_string(top_k) + " exceed 1024 experts or top 32");
  }
  const dim3 grid(ceil_div(tokens, kRouteTokens), plan.count, ceil_div(experts, kRouteExperts));
  launch("route_logits", route_logits, grid, kRouteThreads, 0, stream, x, gate, partial, tokens,
         hidden, experts, plan.run);
  const int per_group = plan.run == 1 ? kGroupPieces : 1;
  const int groups = ceil_div(plan.count, per_group);
  const int sums = groups * experts < kSelectSums ? groups * experts : kSelectSums;
  const int threads = ceil_div(sums < 1024 ? sums : 1024, kWarp) * kWarp;
  const int bytes = (2 * experts + (sums > experts ? sums : experts)) * 4;
  launch("route_select", route_select, tokens, threads, bytes, stream, partial, bias, plan.count,
         per_group, ids, weights, tokens, experts, top_k);
}

void align_experts(const int* ids, int slots, int experts, int tile_rows, int max_tiles,
                   int* slot_of_row, int4* tiles, cudaStream_t stream) {
  if (experts > kMaxExperts) {
    throw std::runtime_error("align_experts: " + std::to_string(experts) + " experts exceed 1024");
  }
  launch("align_experts", align_kernel, 1, 1024, 0, stream, ids, slots, experts, tile_rows,
         max_tiles, slot_of_row, tiles);
}

void combine(const bf16* y, const float* weights, bf16* out, int tokens, int top_k, int hidden,
             cudaStream_t stream) {
  constexpr int kThreads = 256;
  const int64_t pairs = int64_t{tokens} * hidden / 2;
  launch("combine", combine_kernel, static_cast<unsigned>(ceil_div<int64_t>(pairs, kThreads)),
         kThreads, 0, stream, y, weights, out, top_k, hidden, pairs);
}

}  // namespace fd::cuda

// Routing, sorting by expert and weighted recombination of a mixture of experts.
#include "common.cuh"
#include "ops.h"

namespace fd::cuda {
namespace {

constexpr int kRouteTokens = 16;
constexpr int kRouteExperts = 64;
constexpr int kRouteDepth = 32;
constexpr int kRouteThreads = 256;
constexpr int kMaxExperts = 1024;
constexpr int kMaxParts = 16;

/// partial[split, t, e] = sum over the split's k of x[t, k] * gate[k, e], float32: the router
/// decides, so its logits are not rounded to bf16 anywhere. 16 tokens x 64 experts a block; a
/// thread has 4 tokens of one expert.
__global__ void route_logits(const bf16* x, const float* gate, float* partial, int tokens,
                             int hidden, int experts, int k_per_split) {
  __shared__ float x_tile[kRouteTokens][kRouteDepth];
  __shared__ float gate_tile[kRouteDepth][kRouteExperts];
  const int t0 = blockIdx.x * kRouteTokens, split = blockIdx.y, e0 = blockIdx.z * kRouteExperts;
  const int e = threadIdx.x % kRouteExperts, group = threadIdx.x / kRouteExperts;
  const int begin = split * k_per_split, end = min(begin + k_per_split, hidden);
  float acc[4] = {};
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
      for (int i = 0; i < 4; ++i) acc[i] += x_tile[group * 4 + i][k] * w;
    }
    __syncthreads();
  }
  if (e0 + e >= experts) return;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int t = t0 + group * 4 + i;
    if (t < tokens) partial[(int64_t{split} * tokens + t) * experts + e0 + e] = acc[i];
  }
}

/// Softmax over all experts and choice of the top k by p + bias; equal scores go to the lower id.
/// One block a token: `parts` threads per expert add the splits, the first warp does the rest.
__global__ void route_select(const float* partial, const float* bias, int splits, int parts,
                             int* ids, float* weights, int tokens, int experts, int top_k) {
  extern __shared__ float memory[];
  float* sums = memory;                 // [parts][experts]
  float* p = memory + parts * experts;  // [experts]
  float* score = p + experts;           // [experts]
  const int t = blockIdx.x;
  for (int i = threadIdx.x; i < parts * experts; i += blockDim.x) {
    const int e = i % experts, part = i / experts;
    float sum = 0.0f;
    for (int s = part; s < splits; s += parts) {
      sum += partial[(int64_t{s} * tokens + t) * experts + e];
    }
    sums[i] = sum;
  }
  __syncthreads();
  if (threadIdx.x >= kWarp) return;
  const int lane = threadIdx.x;
  float top = -INFINITY;
  for (int e = lane; e < experts; e += kWarp) {
    float logit = 0.0f;
    for (int part = 0; part < parts; ++part) logit += sums[part * experts + e];
    p[e] = logit;
    top = fmaxf(top, logit);
  }
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
    low += w * v.x;
    high += w * v.y;
  }
  reinterpret_cast<uint32_t*>(out)[i] = pack_bf16(low, high);
}

}  // namespace

void route(const bf16* x, const float* gate, const float* bias, float* partial, int splits,
           int* ids, float* weights, int tokens, int hidden, int experts, int top_k,
           cudaStream_t stream) {
  if (experts > kMaxExperts || top_k > kWarp || top_k > experts) {
    throw std::runtime_error("route: " + std::to_string(experts) + " experts and top " +
                             std::to_string(top_k) + " exceed 1024 experts or top 32");
  }
  const int k_per_split = ceil_div(ceil_div(hidden, splits), kRouteDepth) * kRouteDepth;
  const dim3 grid(ceil_div(tokens, kRouteTokens), splits, ceil_div(experts, kRouteExperts));
  route_logits<<<grid, kRouteThreads, 0, stream>>>(x, gate, partial, tokens, hidden, experts,
                                                   k_per_split);
  check_launch("route_logits");
  const int fit = 1024 / experts > 1 ? 1024 / experts : 1;
  const int parts = splits < fit ? splits : fit < kMaxParts ? fit : kMaxParts;
  const int threads = ceil_div(parts * experts < 1024 ? parts * experts : 1024, kWarp) * kWarp;
  const int bytes = (parts + 2) * experts * 4;
  route_select<<<tokens, threads, bytes, stream>>>(partial, bias, splits, parts, ids, weights,
                                                   tokens, experts, top_k);
  check_launch("route_select");
}

void align_experts(const int* ids, int slots, int experts, int tile_rows, int max_tiles,
                   int* slot_of_row, int4* tiles, cudaStream_t stream) {
  if (experts > kMaxExperts) {
    throw std::runtime_error("align_experts: " + std::to_string(experts) + " experts exceed 1024");
  }
  align_kernel<<<1, 1024, 0, stream>>>(ids, slots, experts, tile_rows, max_tiles, slot_of_row,
                                       tiles);
  check_launch("align_experts");
}

void combine(const bf16* y, const float* weights, bf16* out, int tokens, int top_k, int hidden,
             cudaStream_t stream) {
  constexpr int kThreads = 256;
  const int64_t pairs = int64_t{tokens} * hidden / 2;
  combine_kernel<<<static_cast<unsigned>(ceil_div<int64_t>(pairs, kThreads)), kThreads, 0,
                   stream>>>(y, weights, out, top_k, hidden, pairs);
  check_launch("combine");
}

}  // namespace fd::cuda

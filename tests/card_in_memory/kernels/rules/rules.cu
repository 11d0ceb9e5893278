#include <algorithm>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "../cuda/common.cuh"
#include "../cuda/ptx/barrier.cuh"
#include "../cuda/ptx/wgmma.cuh"
#include "rules.h"

namespace fd::cuda {
namespace {

constexpr int kThreads = 128;

/// Every thread takes what another warp has written.
template <bool kKept>
__global__ void block_kernel(const int* in, int* out) {
  __shared__ int held[kThreads];
  held[threadIdx.x] = in[threadIdx.x];
  if (kKept) __syncthreads();
  out[threadIdx.x] = held[kThreads - 1 - threadIdx.x];
}

/// Every lane takes what another one has written.
template <bool kKept>
__global__ void warp_kernel(const int* in, int* out) {
  __shared__ int held[kThreads];
  held[threadIdx.x] = in[kThreads - 1 - threadIdx.x ^ 1];
  if (kKept) __syncwarp();
  out[threadIdx.x] = held[threadIdx.x ^ 1];
}

/// A thread writes again what another one may not have read.
template <bool kKept>
__global__ void reuse_kernel(const int* in, int* out) {
  __shared__ int held[kThreads];
  held[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  const int taken = held[kThreads - 1 - threadIdx.x];
  if (kKept) __syncthreads();
  held[threadIdx.x] = -1;
  out[threadIdx.x] = taken;
}

struct Arrived {
  alignas(128) int held[2][kThreads];
  uint64_t full[2];
};

__device__ void begin_copies(Arrived& arrived, const int* in, int count) {
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) barrier_init(shared_address(&arrived.full[i]), 1);
    barrier_publish();
    for (int i = 0; i < count; ++i) {
      barrier_expect(shared_address(&arrived.full[i]), kThreads * 4);
      bulk_copy(shared_address(arrived.held[i]), in + i * kThreads, kThreads * 4,
                shared_address(&arrived.full[i]), streaming_policy());
    }
  }
  __syncthreads();
}

/// What a bulk copy brings.
template <bool kKept>
__global__ void copy_kernel(const int* in, int* out) {
  __shared__ Arrived arrived;
  begin_copies(arrived, in, 1);
  if (kKept || threadIdx.x == 0) barrier_wait(shared_address(&arrived.full[0]), 0);
  out[threadIdx.x] = arrived.held[0][threadIdx.x];
  if (!kKept) __syncthreads();
}

/// A copy goes where others may still read.
template <bool kKept>
__global__ void ring_kernel(const int* in, int* out) {
  __shared__ Arrived arrived;
  begin_copies(arrived, in, 1);
  barrier_wait(shared_address(&arrived.full[0]), 0);
  const int first = arrived.held[0][threadIdx.x];
  if (kKept) __syncthreads();
  if (threadIdx.x == 0) {
    barrier_expect(shared_address(&arrived.full[0]), kThreads * 4);
    bulk_copy(shared_address(arrived.held[0]), in + kThreads, kThreads * 4,
              shared_address(&arrived.full[0]), streaming_policy());
  }
  barrier_wait(shared_address(&arrived.full[0]), 1);
  out[threadIdx.x] = first + arrived.held[0][threadIdx.x];
}

/// What the older of two groups of copies brings.
template <bool kKept>
__global__ void group_kernel(const int* in, int* out) {
  __shared__ __align__(16) int held[2][kThreads * 4];
  for (int i = 0; i < 2; ++i) {
    copy_async(held[i] + threadIdx.x * 4, in + i * kThreads * 4 + threadIdx.x * 4, true);
    copy_commit();
  }
  copy_wait<kKept ? 1 : 2>();
  out[threadIdx.x] = held[0][threadIdx.x * 4];
  copy_wait<0>();
}

/// One block waits for a number that another has written.
template <bool kKept>
__global__ void release_kernel(const int* in, int* out, unsigned* told) {
  const int lane = threadIdx.x;
  if (blockIdx.x == 0) {
    if (lane > 0) return;
    __stcg(out + kWarp, in[0]);
    if (kKept) {
      add_release(told, 1);
    } else {
      atomicAdd(told, 1u);
    }
  } else {
    while (load_acquire(told) == 0) {
    }
    out[lane] = __ldcg(out + kWarp);
  }
}

/// One block waits for what all lanes of another's warp have written; one of them tells.
template <bool kKept>
__global__ void lanes_kernel(const int* in, int* out, unsigned* told) {
  const int lane = threadIdx.x;
  if (blockIdx.x == 0) {
    __stcg(out + kWarp + lane, in[lane]);
    if (kKept) __syncwarp();
    if (lane == 0) add_release(told, 1);
  } else {
    while (load_acquire(told) == 0) {
    }
    out[lane] = __ldcg(out + kWarp + lane);
  }
}

/// Words that are messages themselves: all four have to be waited for.
template <bool kKept>
__global__ void words_kernel(const int* in, int* out, uint4* message) {
  const int lane = threadIdx.x;
  uint32_t v[4] = {1, 2, 3, 4};
  if (blockIdx.x == 0) {
    store_relaxed(message + lane, v);
  } else {
    do {
      load_relaxed(message + lane, v);
    } while (v[0] == 0 || (kKept && (v[1] == 0 || v[2] == 0 || v[3] == 0)));
    out[lane] = in[lane] + static_cast<int>(v[1] + v[2] + v[3]);
  }
}

struct Matrices {
  alignas(1024) uint16_t b[8][64];
};

enum class Broken { kNothing, kSums, kRegisters, kMemory, kFence };

/// A product of ones: 16 for every element; again with twos.
template <Broken kBroken>
__global__ void wgmma_kernel(const int*, int* out) {
  __shared__ Matrices shared;
  const uint16_t one = 0x3c00;
  for (int i = threadIdx.x; i < 8 * 64; i += kThreads) shared.b[i / 64][i % 64] = one;
  fence_async();
  __syncthreads();
  uint32_t a[4] = {0x3c003c00, 0x3c003c00, 0x3c003c00, 0x3c003c00};
  float sums[4] = {};
  const uint64_t b = (shared_address(shared.b) & 0x3ffff) >> 4 | uint64_t{1} << 16 |
                     uint64_t{64} << 32 | uint64_t{1} << 62;
  if (kBroken != Broken::kFence) wgmma_fence();
  Wgmma<8>::add(sums, a, b);
  wgmma_commit();
  if (kBroken == Broken::kRegisters) a[threadIdx.x % 4] = 0;
  if (kBroken == Broken::kMemory) shared.b[threadIdx.x % 8][threadIdx.x / 8] = 0;
  const float early = sums[0];
  wgmma_wait<0>();
  out[threadIdx.x] = static_cast<int>(kBroken == Broken::kSums ? early : sums[0]) + a[0] % 2;
}

/// A phase of a barrier ends when all have arrived.
template <bool kKept>
__global__ void phase_kernel(const int* in, int* out) {
  __shared__ uint64_t barrier;
  if (threadIdx.x == 0) barrier_init(shared_address(&barrier), kThreads);
  __syncthreads();
  if (kKept || threadIdx.x != 5) barrier_arrive(shared_address(&barrier));
  barrier_wait(shared_address(&barrier), 0);
  out[threadIdx.x] = in[threadIdx.x];
}

/// Lanes of a warp do different things together.
template <bool kKept>
__global__ void lanes_part(const int* in, int* out) {
  if (kKept || threadIdx.x != 7) {
    out[threadIdx.x] = __shfl_sync(kFullMask, in[threadIdx.x], threadIdx.x);
  } else {
    __syncwarp();
  }
}

using Ints = std::vector<int>;

/// count numbers, the first and the step between them.
Ints numbers(int count, int first = 0, int step = 1) {
  Ints made(count);
  for (int i = 0; i < count; ++i) made[i] = first + i * step;
  return made;
}

struct Memory {
  alignas(16) int in[8 * kThreads];
  int out[kThreads];
  alignas(16) unsigned told[4 * kWarp] = {};

  Memory() {
    for (int i = 0; i < 8 * kThreads; ++i) in[i] = i;
    for (int& i : out) i = -77;
  }
};

using Launch = std::function<void(Memory&)>;

struct Rule {
  Ints wanted;
  Launch kept, broken;
};

/// Two blocks wait for each other: they must be there together.
template <typename... Told>
Launch on(void (*kernel)(const int*, int*, Told*...), int blocks = 1, int threads = kThreads) {
  return [=](Memory& m) {
    cudaLaunchAttribute together{};
    together.id = cudaLaunchAttributeCooperative;
    together.val.cooperative = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = blocks;
    config.blockDim = threads;
    config.attrs = &together;
    config.numAttrs = blocks > 1 ? 1 : 0;
    cudaLaunchKernelEx(&config, kernel, m.in, m.out, reinterpret_cast<Told*>(m.told)...);
  };
}

const std::map<std::string, Rule>& rules() {
  constexpr int kLast = kThreads - 1;
  const Launch product = on(wgmma_kernel<Broken::kNothing>);
  const Ints products(kThreads, 16);
  static const std::map<std::string, Rule> all = {
      {"a block's barrier",
       {numbers(kThreads, kLast, -1), on(block_kernel<true>), on(block_kernel<false>)}},
      {"a warp's barrier",
       {numbers(kThreads, kLast, -1), on(warp_kernel<true>), on(warp_kernel<false>)}},
      {"a barrier before memory is used again",
       {numbers(kThreads, kLast, -1), on(reuse_kernel<true>), on(reuse_kernel<false>)}},
      {"the wait for a bulk copy",
       {numbers(kThreads), on(copy_kernel<true>), on(copy_kernel<false>)}},
      {"readers before the next copy",
       {numbers(kThreads, kThreads, 2), on(ring_kernel<true>), on(ring_kernel<false>)}},
      {"the wait for a group of copies",
       {numbers(kThreads, 0, 4), on(group_kernel<true>), on(group_kernel<false>)}},
      {"a release",
       {Ints(kWarp, 0), on(release_kernel<true>, 2, kWarp), on(release_kernel<false>, 2, kWarp)}},
      {"a warp's barrier before a release",
       {numbers(kWarp), on(lanes_kernel<true>, 2, kWarp), on(lanes_kernel<false>, 2, kWarp)}},
      {"all words of a message",
       {numbers(kWarp, 9), on(words_kernel<true>, 2, kWarp), on(words_kernel<false>, 2, kWarp)}},
      {"arrivals at a phase", {numbers(kThreads), on(phase_kernel<true>), on(phase_kernel<false>)}},
      {"lanes together", {numbers(kThreads), on(lanes_part<true>), on(lanes_part<false>)}},
      {"the wait for products", {products, product, on(wgmma_kernel<Broken::kSums>)}},
      {"products' registers", {products, product, on(wgmma_kernel<Broken::kRegisters>)}},
      {"products' memory", {products, product, on(wgmma_kernel<Broken::kMemory>)}},
      {"the fence before products", {products, product, on(wgmma_kernel<Broken::kFence>)}},
  };
  return all;
}

}  // namespace
}  // namespace fd::cuda

namespace card {

std::vector<std::string> rule_names() {
  std::vector<std::string> names;
  for (const auto& [name, rule] : fd::cuda::rules()) names.push_back(name);
  return names;
}

bool right(const std::string& name, bool kept) {
  fd::cuda::Memory memory;
  const fd::cuda::Rule& rule = fd::cuda::rules().at(name);
  (kept ? rule.kept : rule.broken)(memory);
  return std::equal(rule.wanted.begin(), rule.wanted.end(), memory.out);
}

}  // namespace card

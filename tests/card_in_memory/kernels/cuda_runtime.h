// Stands for CUDA's header where kernels run without a card; see machine.h for how.
#pragma once

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <tuple>
#include <utility>

#include "machine.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__  // also an attribute's name in the standard library: nothing must be left
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

// `__shared__` of the kernels becomes these, see build_kernels.py.
#define CARD_SHARED(name, alignment, ...)                                               \
  static const char card_variable_##name = 0;                                           \
  auto& name = *static_cast<std::remove_reference_t<__VA_ARGS__>*>(card::static_shared( \
      &card_variable_##name, sizeof(__VA_ARGS__), std::max<int>(alignment, alignof(__VA_ARGS__))))
#define CARD_DYNAMIC_SHARED(name, alignment, ...) \
  __VA_ARGS__* const name = static_cast<__VA_ARGS__*>(card::dynamic_shared(alignment))

// -- vectors --------------------------------------------------------------------------------------

struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) ulonglong2 {
  unsigned long long x, y;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// -- the run-time ---------------------------------------------------------------------------------

using cudaError_t = int;
struct CUstream_st;
using cudaStream_t = CUstream_st*;
constexpr cudaError_t cudaSuccess = 0;
enum cudaMemcpyKind { cudaMemcpyDeviceToDevice };
enum { cudaLaunchAttributeProgrammaticStreamSerialization, cudaLaunchAttributeCooperative };
enum { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMultiProcessorCount
};
struct cudaLaunchAttribute {
  int id;
  struct {
    int programmaticStreamSerializationAllowed;
    int cooperative;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  int numAttrs;
};
inline const char* cudaGetErrorString(cudaError_t) { return "an error of the card in memory"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                                   cudaStream_t) {
  std::memmove(to, from, bytes);
  return cudaSuccess;
}
template <typename Function>
cudaError_t cudaFuncSetAttribute(Function, int, int) {
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int device);

template <typename... Parameters, typename... Arguments>
void card_launch(const dim3& blocks, const dim3& threads, size_t shared_bytes, bool together,
                 void (*kernel)(Parameters...), Arguments... arguments) {
  card::Grid grid;
  grid.blocks = blocks;
  grid.threads = threads;
  grid.shared_bytes = static_cast<int64_t>(shared_bytes);
  grid.together = together;
  grid.kernel = [kernel, held = std::tuple<Parameters...>(arguments...)] {
    std::apply(kernel, held);
  };
  card::run(std::move(grid));
}

/// kernel<<<blocks, threads, shared_bytes, stream>>>(arguments...)
struct CardLaunch {
  dim3 blocks, threads;
  size_t shared_bytes;
  CardLaunch(const dim3& blocks, const dim3& threads, size_t shared_bytes = 0,
             cudaStream_t = nullptr)
      : blocks(blocks), threads(threads), shared_bytes(shared_bytes) {}

  template <typename... Parameters, typename... Arguments>
  void operator()(void (*kernel)(Parameters...), Arguments... arguments) const {
    card_launch(blocks, threads, shared_bytes, false, kernel, arguments...);
  }
};

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  bool together = false;
  for (int i = 0; i < config->numAttrs; ++i) {
    together = together || config->attrs[i].id == cudaLaunchAttributeCooperative;
  }
  card_launch(config->gridDim, config->blockDim, config->dynamicSmemBytes, together, kernel,
              arguments...);
  return cudaSuccess;
}

// -- what threads do together ---------------------------------------------------------------------

inline void __syncthreads() { card::sync(0, 0, true); }
inline int __syncthreads_and(int mine) { return card::sync(0, 0, mine != 0); }
inline void __syncwarp(unsigned = ~0u) { card::meet(card::Meeting::kSync, nullptr, nullptr); }
inline void __threadfence() { card::release(); }

/// A lane's part of a shuffle: takes the value of lane `from`.
template <typename T>
struct CardShuffle {
  T value, found;
  int from;

  static void exchange(card::Warp& warp) {
    for (int lane = 0; lane < card::kLanes; ++lane) {
      if ((warp.present >> lane & 1) == 0) continue;
      auto& mine = *static_cast<CardShuffle*>(warp.brought[lane]);
      if ((warp.present >> mine.from & 1) == 0) {
        std::memset(static_cast<void*>(&mine.found), 0xff, sizeof(T));  // nobody is there
      } else {
        mine.found = static_cast<CardShuffle*>(warp.brought[mine.from])->value;
      }
    }
  }

  static T take(T value, int from) {
    CardShuffle part{value, value, from};
    card::meet(card::Meeting::kShuffle, exchange, &part);
    return part.found;
  }
};
template <typename T>
T __shfl_sync(unsigned, T value, int from) {
  return CardShuffle<T>::take(value, from % card::kLanes);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return CardShuffle<T>::take(value, card::self->lane ^ mask);
}
template <typename T>
T __shfl_up_sync(unsigned, T value, int by) {
  return CardShuffle<T>::take(value, std::max(card::self->lane - by, 0));
}

/// A lane's part of a vote: gets a bit of every lane.
struct CardVote {
  bool mine;
  unsigned all = 0;

  static void count(card::Warp& warp) {
    unsigned all = 0;
    for (int lane = 0; lane < card::kLanes; ++lane) {
      if ((warp.present >> lane & 1) == 0) continue;
      if (static_cast<CardVote*>(warp.brought[lane])->mine) all |= 1u << lane;
    }
    for (int lane = 0; lane < card::kLanes; ++lane) {
      if (warp.present >> lane & 1) static_cast<CardVote*>(warp.brought[lane])->all = all;
    }
  }
};
inline unsigned __ballot_sync(unsigned, bool mine) {
  CardVote part{mine};
  card::meet(card::Meeting::kVote, CardVote::count, &part);
  return part.all;
}
inline int __any_sync(unsigned mask, bool mine) { return __ballot_sync(mask, mine) != 0; }
inline int __all_sync(unsigned mask, bool mine) { return __ballot_sync(mask, !mine) == 0; }
template <typename Choose>
unsigned card_reduce(unsigned v, Choose choose) {
  for (int i = 16; i > 0; i /= 2) v = choose(v, __shfl_xor_sync(~0u, v, i));
  return v;
}
inline unsigned __reduce_max_sync(unsigned, unsigned v) {
  return card_reduce(v, [](unsigned a, unsigned b) { return std::max(a, b); });
}
inline unsigned __reduce_min_sync(unsigned, unsigned v) {
  return card_reduce(v, [](unsigned a, unsigned b) { return std::min(a, b); });
}

// -- memory ---------------------------------------------------------------------------------------

inline uint64_t __cvta_generic_to_shared(const void* p) { return card::shared_offset(p); }

template <typename T>
T __ldg(const T* p) {
  return *p;
}
template <typename T>
T __ldcg(const T* p) {
  T value;
  card::load_late(p, &value, sizeof(T));
  return value;
}
template <typename T>
void __stcg(T* p, T value) {
  card::store_late(p, &value, sizeof(T));
}

template <typename T>
struct CardSame {
  using Type = T;
};
template <typename T, typename Change>
T card_atomic(T* at, Change change) {
  card::maybe_give_way();
  const T before = *at;
  *at = change(before);
  card::signal();
  return before;
}
template <typename T>
T atomicAdd(T* at, typename CardSame<T>::Type value) {
  return card_atomic(at, [=](T old) { return static_cast<T>(old + value); });
}
template <typename T>
T atomicMin(T* at, typename CardSame<T>::Type value) {
  return card_atomic(at, [=](T old) { return std::min(old, value); });
}
template <typename T>
T atomicMax(T* at, typename CardSame<T>::Type value) {
  return card_atomic(at, [=](T old) { return std::max(old, value); });
}
template <typename T>
T atomicOr(T* at, typename CardSame<T>::Type value) {
  return card_atomic(at, [=](T old) { return old | value; });
}

// -- arithmetic -----------------------------------------------------------------------------------

template <typename To, typename From>
To same_bits(From value) {
  To to;
  static_assert(sizeof(to) == sizeof(value));
  std::memcpy(&to, &value, sizeof(to));
  return to;
}
inline uint32_t __float_as_uint(float value) { return same_bits<uint32_t>(value); }
inline int __float_as_int(float value) { return same_bits<int>(value); }
inline float __uint_as_float(uint32_t bits) { return same_bits<float>(bits); }
inline float __int_as_float(int bits) { return same_bits<float>(bits); }
inline double __longlong_as_double(long long bits) { return same_bits<double>(bits); }

/// The largest float32 that is not above big + small, where `small` is what `big` was rounded by.
inline float card_round_down(double big, double small) {
  const auto near = static_cast<float>(big);
  const bool above = near > big || (near == big && small < 0);
  return above ? std::nextafterf(near, -INFINITY) : near;
}
inline float card_add_down(double a, double b) {
  const double sum = a + b, part = sum - a;
  return card_round_down(sum, (a - (sum - part)) + (b - part));
}
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fmaf_rd(float a, float b, float c) {
  return card_add_down(static_cast<double>(a) * b, c);
}
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fadd_rd(float a, float b) { return card_add_down(a, b); }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __expf(float a) { return std::exp(a); }
inline float rsqrtf(float a) { return 1.0f / std::sqrt(a); }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline float __int2float_rn(int a) { return static_cast<float>(a); }
inline int card_whole(double a) {
  return std::isnan(a) ? 0 : static_cast<int>(std::clamp(a, -2147483648.0, 2147483647.0));
}
inline int __float2int_rd(float a) { return card_whole(std::floor(a)); }
inline int __float2int_rn(float a) { return card_whole(std::nearbyint(a)); }
inline unsigned long long __float2ull_rn(float a) {
  return static_cast<unsigned long long>(std::nearbyint(a));
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __clz(int bits) { return bits == 0 ? 32 : __builtin_clz(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t both = uint64_t{b} << 32 | a;
  unsigned chosen = 0;
  for (int i = 0; i < 4; ++i) chosen |= (both >> (selector >> 4 * i & 7) * 8 & 255) << 8 * i;
  return chosen;
}
inline unsigned __vmaxu2(unsigned a, unsigned b) {
  return std::max(a >> 16, b >> 16) << 16 | std::max(a & 0xffff, b & 0xffff);
}
using std::isfinite;
using std::isinf;
using std::isnan;
using std::max;
using std::min;

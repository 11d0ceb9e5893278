// Stands for CUDA's header where kernels run without a card: the threads of a block are fibers of
// one host thread, blocks come one after another, device memory is main memory. Only what the
// encoders' kernels use.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>

#define __CUDACC__ 1
#define __global__
#define __device__
#define __forceinline__ inline
#define __noinline__  // also an attribute's name in the standard library: nothing must be left
#define __shared__ static
#define __launch_bounds__(...)

struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

using cudaError_t = int;
struct CUstream_st;
using cudaStream_t = CUstream_st*;
constexpr cudaError_t cudaSuccess = 0;
enum cudaMemcpyKind { cudaMemcpyDeviceToDevice };
enum { cudaLaunchAttributeProgrammaticStreamSerialization };
struct cudaLaunchAttribute {
  int id;
  struct {
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  int numAttrs;
};
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                                   cudaStream_t) {
  std::memmove(to, from, bytes);
  return cudaSuccess;
}

namespace fibers {
void run(dim3 grid, int threads, const std::function<void()>& kernel);
void wait_for_block();
void wait_for_warp();
int lane();
uint64_t* warp_slots();

template <typename T>
T exchange(T value, int from) {
  uint64_t raw = 0;
  std::memcpy(&raw, &value, sizeof(value));
  warp_slots()[lane()] = raw;
  wait_for_warp();
  T found;
  std::memcpy(&found, &warp_slots()[from], sizeof(found));
  wait_for_warp();
  return found;
}
}  // namespace fibers

template <typename... Parameters>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Parameters... arguments) {
  fibers::run(config->gridDim, static_cast<int>(config->blockDim.x), [&] { kernel(arguments...); });
  return cudaSuccess;
}

inline void __syncthreads() { fibers::wait_for_block(); }
inline void __syncwarp(unsigned = 0) { fibers::wait_for_warp(); }
template <typename T>
T __shfl_sync(unsigned, T value, int from) {
  return fibers::exchange(value, from);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return fibers::exchange(value, fibers::lane() ^ mask);
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned v) {
  for (int i = 16; i > 0; i /= 2) v = std::max(v, __shfl_xor_sync(mask, v, i));
  return v;
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned v) {
  for (int i = 16; i > 0; i /= 2) v = std::min(v, __shfl_xor_sync(mask, v, i));
  return v;
}
inline uint64_t __cvta_generic_to_shared(const void*) { return 0; }

inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
template <typename To, typename From>
To same_bits(From value) {
  To to;
  static_assert(sizeof(to) == sizeof(value));
  std::memcpy(&to, &value, sizeof(to));
  return to;
}
inline uint32_t __float_as_uint(float value) { return same_bits<uint32_t>(value); }
inline float __uint_as_float(uint32_t bits) { return same_bits<float>(bits); }
inline float __int_as_float(int bits) { return same_bits<float>(bits); }
inline double __longlong_as_double(long long bits) { return same_bits<double>(bits); }
using std::isfinite;
using std::max;
using std::min;

// Arithmetic whose bits are those of the encoder on the CPU: single IEEE operations that no
// compiler fuses, and numpy's order of sums.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../common.cuh"

namespace fd::cuda {

constexpr int kCodewords = 256;
constexpr int kCodeRows = 4;      // rows of a codeword
constexpr int kGroupRows = 64;    // rows that share a local scale
constexpr int kGroupBlocks = 16;  // codewords of a group
constexpr int kMaxLocal = 15;

/// Launches a kernel that starts once all before it has ended, unlike `launch`.
template <typename... Parameters, typename... Arguments>
void queue(const char* name, void (*kernel)(Parameters...), dim3 grid, int threads,
           cudaStream_t stream, const Arguments&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), name);
}

/// Nearest bfloat16 of a finite number, ties to even, as float32.
__device__ __forceinline__ float round_bf16(float value) {
  const uint32_t bits = __float_as_uint(value);
  return __uint_as_float((bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u);
}

/// Sum of value(first) ... value(first + count - 1) in the order of numpy's add.reduce over an axis
/// that is contiguous: pairwise above 128 terms, eight running sums below.
template <int kDepth = 12, typename Value>
__device__ __noinline__ double pairwise_sum(const Value& value, int first, int count) {
  if (count < 8) {
    double sum = 0.0;
    for (int i = 0; i < count; ++i) sum = __dadd_rn(sum, value(first + i));
    return sum;
  }
  if constexpr (kDepth > 0) {
    if (count > 128) {
      const int half = count / 2 - count / 2 % 8;
      const double left = pairwise_sum<kDepth - 1>(value, first, half);
      return __dadd_rn(left, pairwise_sum<kDepth - 1>(value, first + half, count - half));
    }
  }
  double run[8];
  for (int i = 0; i < 8; ++i) run[i] = value(first + i);
  const int whole = count - count % 8;
  for (int i = 8; i < whole; i += 8) {
    for (int j = 0; j < 8; ++j) run[j] = __dadd_rn(run[j], value(first + i + j));
  }
  double sum = __dadd_rn(__dadd_rn(__dadd_rn(run[0], run[1]), __dadd_rn(run[2], run[3])),
                         __dadd_rn(__dadd_rn(run[4], run[5]), __dadd_rn(run[6], run[7])));
  for (int i = whole; i < count; ++i) sum = __dadd_rn(sum, value(first + i));
  return sum;
}

/// u = metric x for a symmetric metric [4][4].
__device__ __forceinline__ float4 apply_metric(const float4 (&metric)[kCodeRows], const float4& x) {
  float4 u;
  u.x = __fmaf_rn(
      metric[3].x, x.w,
      __fmaf_rn(metric[2].x, x.z, __fmaf_rn(metric[1].x, x.y, __fmaf_rn(metric[0].x, x.x, 0.0f))));
  u.y = __fmaf_rn(
      metric[3].y, x.w,
      __fmaf_rn(metric[2].y, x.z, __fmaf_rn(metric[1].y, x.y, __fmaf_rn(metric[0].y, x.x, 0.0f))));
  u.z = __fmaf_rn(
      metric[3].z, x.w,
      __fmaf_rn(metric[2].z, x.z, __fmaf_rn(metric[1].z, x.y, __fmaf_rn(metric[0].z, x.x, 0.0f))));
  u.w = __fmaf_rn(
      metric[3].w, x.w,
      __fmaf_rn(metric[2].w, x.z, __fmaf_rn(metric[1].w, x.y, __fmaf_rn(metric[0].w, x.x, 0.0f))));
  return u;
}

__device__ __forceinline__ float dot4(const float4& x, const float4& y) {
  return __fmaf_rn(x.w, y.w, __fmaf_rn(x.z, y.z, __fmaf_rn(x.y, y.y, __fmaf_rn(x.x, y.x, 0.0f))));
}

/// u.c - scale half(c) of a codeword c.
__device__ __forceinline__ float score_of(const float4& u, const float4& c, float half,
                                          float minus_scale) {
  float s = __fmul_rn(minus_scale, half);
  s = __fmaf_rn(u.x, c.x, s);
  s = __fmaf_rn(u.y, c.y, s);
  s = __fmaf_rn(u.z, c.z, s);
  return __fmaf_rn(u.w, c.w, s);
}

}  // namespace fd::cuda

// The checkpoint's layouts of weights, element by element.
#pragma once

#include "common.cuh"

namespace fd::cuda {

/// Position of W[k, n] in the file's permuted int8 layout (bytes).
__device__ __forceinline__ int64_t int8_position(int k, int n, int in_features) {
  const int64_t pair_tile = int64_t{n / 2} * (in_features / 64) + k / 64;
  return pair_tile * 128 + (n % 2) * 64 + (k % 64) / 16 * 16 + 2 * (k % 8) + (k % 16) / 8;
}

/// Position of W[k, n] in the file's permuted int4 layout (nibbles, low first).
__device__ __forceinline__ int64_t int4_position(int k, int n, int in_features) {
  const int64_t tile = int64_t{n / 4} * (in_features / 64) + k / 64;
  return tile * 256 + (n % 4) * 64 + (k % 64) / 32 * 32 + 4 * (k % 8) + (k % 32) / 8;
}

/// Reads one element of the source in any layout; positions outside the matrix give weight zero.
struct Source {
  const void* data;
  bool is_float;
  bool transposed;
  int in_features;
  int out_features;

  __device__ bool inside(int k, int n) const { return k < in_features && n < out_features; }

  __device__ uint32_t code_byte(int k, int n) const {
    if (!inside(k, n)) return 0;
    return static_cast<const uint8_t*>(data)[int64_t{k / 4} * out_features + n];
  }
  __device__ uint32_t int8(int k, int n) const {
    if (!inside(k, n)) return 128;
    return static_cast<const uint8_t*>(data)[int8_position(k, n, in_features)];
  }
  __device__ uint32_t int4(int k, int n) const {
    if (!inside(k, n)) return 8;
    const int64_t at = int4_position(k, n, in_features);
    return (static_cast<const uint8_t*>(data)[at / 2] >> (4 * (at % 2))) & 15u;
  }
  __device__ uint32_t bf16_bits(int k, int n) const {
    if (!inside(k, n)) return 0;
    const int64_t at = transposed ? int64_t{n} * in_features + k : int64_t{k} * out_features + n;
    if (!is_float) return static_cast<const uint16_t*>(data)[at];
    return __bfloat16_as_ushort(__float2bfloat16_rn(static_cast<const float*>(data)[at]));
  }
};

}  // namespace fd::cuda

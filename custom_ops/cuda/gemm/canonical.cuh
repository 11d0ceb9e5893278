// The one product that every kernel of an expert computes, so that a row's bits depend on the row
// and the weight alone, never on the rows beside it nor on the kernel that serves a step:
//  * a row of x is float16 times a power of two of its own (row_scale), in slot order (decode.cuh);
//    from bf16 that is exact but for elements 2^-29 times the row's largest and below;
//  * a sum is one chain of m16n8k16 steps from the first row of K to the last; mma.sync and wgmma
//    give the same bits along it;
//  * sums become values in finished(), every rounding spelled out.
// A kernel may cut a chain anywhere as long as the next piece goes on from the sums so far.
#pragma once

#include <cuda_fp16.h>

#include "../common.cuh"
#include "decode.cuh"

namespace fd::cuda {

#ifdef __CUDACC__

constexpr int kTopExponent = 14;  // of the largest element of a converted row

/// Power of two that brings a row with this largest magnitude into float16's range; 1 for a row
/// that is zero or not finite.
__device__ __forceinline__ float row_scale(float largest) {
  const int exponent = static_cast<int>(__float_as_uint(largest) >> 23 & 255u);
  if (exponent == 0 || exponent == 255) return 1.0f;
  const int shift = min(kTopExponent + 127 - exponent, 126);
  return __uint_as_float(static_cast<uint32_t>(shift + 127) << 23);
}

/// 1 / scale for a power of two between 2^-126 and 2^126.
__device__ __forceinline__ float inverse_scale(float scale) {
  return __uint_as_float(0x7f000000u - __float_as_uint(scale));
}

/// Eight consecutive elements of a row as the four words of their slots.
__device__ __forceinline__ uint4 to_slots(const uint4& x, float scale) {
  const float2 v[4] = {unpack_bf16(x.x), unpack_bf16(x.y), unpack_bf16(x.z), unpack_bf16(x.w)};
  auto pair = [&](float low, float high) {
    const __half2 h = __floats2half2_rn(__fmul_rn(low, scale), __fmul_rn(high, scale));
    return *reinterpret_cast<const uint32_t*>(&h);
  };
  return make_uint4(pair(v[1].y, v[3].y), pair(v[1].x, v[3].x), pair(v[0].y, v[2].y),
                    pair(v[0].x, v[2].x));
}

__device__ __forceinline__ float largest_of(const uint4& x) {
  float top = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 v = unpack_bf16(word_of(x, i));
    top = fmaxf(top, fmaxf(fabsf(v.x), fabsf(v.y)));
  }
  return top;
}

__device__ __forceinline__ float scaled(float sum, float column_scale, float inverse) {
  return __fmul_rn(__fmul_rn(sum, column_scale), inverse);
}

/// silu(gate) * up.
__device__ __forceinline__ float swiglu(float gate, float up) {
  return __fmul_rn(__fdiv_rn(gate, __fadd_rn(1.0f, __expf(-gate))), up);
}

#endif  // __CUDACC__

}  // namespace fd::cuda

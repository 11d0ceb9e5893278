// How ranks' numbers are added: in their order, in float32, one rounding at the end.
#pragma once

#include "common.cuh"

namespace fd::cuda {

/// Eight numbers of 16 bytes of bf16. Begins with the first rank's, as 0 + -0 would be 0.
struct EightSums {
  float2 sums[4];

  __device__ __forceinline__ explicit EightSums(const uint4& first)
      : sums{unpack_bf16(first.x), unpack_bf16(first.y), unpack_bf16(first.z),
             unpack_bf16(first.w)} {}

  __device__ __forceinline__ void add(const uint4& next) {
    const uint32_t words[4] = {next.x, next.y, next.z, next.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 pair = unpack_bf16(words[j]);
      sums[j] = make_float2(sums[j].x + pair.x, sums[j].y + pair.y);
    }
  }

  __device__ __forceinline__ uint4 rounded() const {
    return make_uint4(pack_bf16(sums[0].x, sums[0].y), pack_bf16(sums[1].x, sums[1].y),
                      pack_bf16(sums[2].x, sums[2].y), pack_bf16(sums[3].x, sums[3].y));
  }
};

}  // namespace fd::cuda

// Coded weights to the byte operands of a tensor core, without their local scales: what the integer
// products take (stream_digits.cuh).
#pragma once

#include "decode.cuh"

namespace fd::cuda {

#ifdef __CUDACC__

constexpr uint32_t kFieldBytes = 0x3ffc3ffcu;  // [4 f2, f0, 4 f3, f1]

/// Added to a code's base for the two forms that are put together: half of the code in the mantissa
/// of a number from 2^24 on; and four times it in one from 2^21 on, where 3,360 cancels what the
/// first one's exponent carries into the low 14 bits.
constexpr float kDigitLow = 8388608.0f;
constexpr float kDigitHigh = 2097152.0f - 8388608.0f + 3360.0f;

/// What a lane needs of its columns g and g + 8 to decode a byte into a register of four fields.
template <bool kExact>
struct DigitCode;

/// Two multiply-adds leave half of the code and four times it where one mask cuts out two fields of
/// each.
template <>
struct DigitCode<false> {
  uint32_t magic[2];
  float scale[2], low_base[2], high_base[2];

  __device__ __forceinline__ void set(int i, const ColumnCode& code) {
    magic[i] = code.magic;
    scale[i] = code.scale;
    low_base[i] = code.base + kDigitLow;
    high_base[i] = code.base + kDigitHigh;
  }

  __device__ __forceinline__ void load(const ExpertWeight& w, int64_t first) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint4 v = __ldg(reinterpret_cast<const uint4*>(w.codes + first + 8 * i));
      set(i, {v.x, __uint_as_float(v.y), __uint_as_float(v.z), v.w});
    }
  }

  template <int kByte>
  __device__ __forceinline__ uint32_t fields(uint32_t word, const Registers&) const {
    constexpr int kColumn = kByte / 2;
    const float byte = byte_in<kByte>(word, magic[kColumn]);
    const uint32_t low = __float_as_uint(__fmaf_rd(byte, scale[kColumn], low_base[kColumn]));
    const uint32_t high = __float_as_uint(__fmaf_rd(byte, scale[kColumn], high_base[kColumn]));
    return multiply_add(high, 65536u, low) & kFieldBytes;
  }
};

template <>
struct DigitCode<true> {
  LaneCode<true> code;

  __device__ __forceinline__ void load(const ExpertWeight& w, int64_t first) {
    code.load(w.codes, w.exact, first);
  }

  template <int kByte>
  __device__ __forceinline__ uint32_t fields(uint32_t word, const Registers& held) const {
    const uint32_t pair = code.template codes<kByte / 2>(word, held);
    const uint32_t d = kByte % 2 == 0 ? pair & 0xffffu : pair >> 16;
    return (d << 18 | d >> 1) & kFieldBytes;
  }
};

#endif  // __CUDACC__

}  // namespace fd::cuda

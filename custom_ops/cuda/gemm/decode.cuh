// Coded weights to the f16 operands of a tensor core, exactly.
//
// A lane's word (or words) of 32 rows becomes the A operands of two k-steps of 16. Slot k of a
// step is a fixed row of the 32, the same for all codings and kernels, see row_of_slot(); the
// activations are put in that order when they are converted.
#pragma once

#include <cuda_fp16.h>

#include "../common.cuh"
#include "expert_weight.h"

namespace fd::cuda {

/// Row, of 32, whose weight stands in slot `slot` of the two k-steps.
__host__ __device__ constexpr int row_of_slot(int slot) {
  return 8 * (slot / 2 % 4) + 4 * (slot % 2) + 3 - slot / 8;
}

#ifdef __CUDACC__

constexpr uint32_t kHalf1024 = 0x64006400u;  // 1024.0 twice: ten mantissa bits count units
constexpr uint32_t kFields = 0x003f003fu;
constexpr uint32_t kFieldsTimes8 = 0x01f801f8u;

/// Numbers that have to sit in registers, made from a zero that the compiler cannot know: an
/// instruction takes one immediate, a second one would be moved in for every use.
struct Registers {
  uint32_t half1024;
  uint32_t two16;

  __device__ explicit Registers(uint32_t zero) : half1024(kHalf1024 ^ zero), two16(65536u ^ zero) {}
};

/// Byte `kIndex` of the word as mantissa bits 8 to 15 of `magic`: 2^15 + 256 m + byte + l / 256.
template <int kIndex>
__device__ __forceinline__ float byte_in(uint32_t word, uint32_t magic) {
  return __uint_as_float(__byte_perm(word, magic, 0x7604 | (kIndex << 4)));
}

/// Added to a code's base to cancel the float exponent that packing two codes carries over.
constexpr float kCarry = 0xb500;

/// What a lane needs of its columns g and g + 8 to decode CCQ. Fast: one multiply-add rounded down
/// leaves the code in low mantissa bits. Exact: the reference's own multiply-add and floor.
template <bool kExact>
struct LaneCode;

template <>
struct LaneCode<false> {
  uint32_t magic[2];
  float scale[2], base[2], odd_base[2];

  __device__ __forceinline__ void load(const ColumnCode* codes, const float2*, int64_t first) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint4 v = __ldg(reinterpret_cast<const uint4*>(codes + first + 8 * i));
      magic[i] = v.x;
      scale[i] = __uint_as_float(v.y);
      base[i] = __uint_as_float(v.z);
      odd_base[i] = base[i] + kCarry;
    }
  }

  /// Codes of bytes 2 kColumn and 2 kColumn + 1 in the low 15 bits of two halves.
  template <int kColumn>
  __device__ __forceinline__ uint32_t codes(uint32_t word, const Registers& held) const {
    const uint32_t low = __float_as_uint(
        __fmaf_rd(byte_in<2 * kColumn>(word, magic[kColumn]), scale[kColumn], base[kColumn]));
    const uint32_t high = __float_as_uint(__fmaf_rd(byte_in<2 * kColumn + 1>(word, magic[kColumn]),
                                                    scale[kColumn], odd_base[kColumn]));
    // a multiply-add runs at twice the rate of a permutation
    return multiply_add(high, held.two16, low);
  }
};

template <>
struct LaneCode<true> {
  float scale[2], bias[2];

  __device__ __forceinline__ void load(const ColumnCode*, const float2* exact, int64_t first) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float2 v = __ldg(exact + first + 8 * i);
      scale[i] = v.x;
      bias[i] = v.y;
    }
  }

  template <int kColumn>
  __device__ __forceinline__ uint32_t codes(uint32_t word, const Registers&) const {
    uint32_t code[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float byte =
          __uint_as_float(__byte_perm(word, 0x4b000000u, 0x7440 | (2 * kColumn + i)));
      const float raw = __fmaf_rn(byte - 8388608.0f, scale[kColumn], bias[kColumn]);
      code[i] = static_cast<uint32_t>(__float2int_rd(raw));
    }
    return __byte_perm(code[0], code[1], 0x5410);
  }
};

/// The reference's own multiply-add without a conversion, for codes between -2^22 and 2^22 - 1.
struct BoundedCode {
  float scale[2], bias[2];

  /// Whether the codes of both columns lie within the bounds.
  __device__ __forceinline__ bool load(const float2* exact, int64_t first) {
    constexpr float kBound = 4194304.0f;
    bool fits = true;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float2 v = __ldg(exact + first + 8 * i);
      scale[i] = v.x;
      bias[i] = v.y;
      fits = fits && fabsf(v.y) < kBound && fabsf(__fmaf_rn(255.0f, v.x, v.y)) < kBound;
    }
    return fits;
  }

  template <int kColumn>
  __device__ __forceinline__ uint32_t codes(uint32_t word, const Registers&) const {
    uint32_t code[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float byte =
          __uint_as_float(__byte_perm(word, 0x4b000000u, 0x7440 | (2 * kColumn + i)));
      const float raw = __fmaf_rn(byte - 8388608.0f, scale[kColumn], bias[kColumn]);
      // 2^23 + 2^22: a float's last bit counts ones, so that rounding down is the floor
      code[i] = __float_as_uint(__fadd_rd(raw, 12582912.0f));
    }
    return __byte_perm(code[0], code[1], 0x5410);
  }
};

/// Local scales of one 64-row group for a lane's two columns, as the decoder's multipliers.
struct GroupScale {
  uint32_t one, eighth, offset, eighth_offset;

  /// `pairs`: nibbles of column g in the low half, of g + 8 in the high half.
  template <int kNibble>
  __device__ __forceinline__ static GroupScale of(uint32_t pairs, const Registers& held) {
    const uint32_t v = kNibble < 2 ? pairs : pairs >> 8;
    GroupScale s;
    if constexpr (kNibble % 2 == 0) {
      s.one = fma2(and_or(v, 0x000f000fu, held.half1024), 0x3c003c00u, 0xe400e400u);  // 1, -1024
    } else {
      s.one = fma2(and_or(v, 0x00f000f0u, held.half1024), 0x2c002c00u, 0xd400d400u);  // 1/16, -64
    }
    s.eighth = fma2(s.one, 0x30003000u, 0x80008000u);         // 1/8
    s.offset = fma2(s.one, 0xe420e420u, 0x80008000u);         // -1056 = -(1024 + 32)
    s.eighth_offset = fma2(s.one, 0xd900d900u, 0x80008000u);  // -160 = -(128 + 32)
    return s;
  }
};

/// One k-step of CCQ from the codes of a word's two columns: (field - 32) * local scale, at most
/// ten bits, exact.
template <int kStep>
__device__ __forceinline__ void ccq_step(const uint32_t (&codes)[2], const GroupScale& s,
                                         const Registers& held, uint32_t (&a)[4]) {
  const uint32_t first = kStep == 0 ? codes[0] : codes[0] >> 6;
  const uint32_t second = kStep == 0 ? codes[1] : codes[1] >> 6;
  a[0] = fma2_half<0>(and_or(first, kFields, held.half1024), s.one, s.offset);
  a[1] = fma2_half<1>(and_or(second, kFields, held.half1024), s.one, s.offset);
  a[2] = fma2_half<0>(and_or(first, kFieldsTimes8, held.half1024), s.eighth, s.eighth_offset);
  a[3] = fma2_half<1>(and_or(second, kFieldsTimes8, held.half1024), s.eighth, s.eighth_offset);
}

/// One k-step of int4: nibble - 8. `words`: of column g and g + 8; nibble j is row j of eight.
template <int kStep>
__device__ __forceinline__ void int4_step(uint32_t first, uint32_t second, const Registers& held,
                                          uint32_t (&a)[4]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t word = i == 0 ? first : second, v = kStep == 0 ? word >> 8 : word;
    a[i] = fma2(and_or(v, 0x00f000f0u, held.half1024), 0x2c002c00u, 0xd480d480u);      // 1/16, -72
    a[i + 2] = fma2(and_or(v, 0x000f000fu, held.half1024), 0x3c003c00u, 0xe408e408u);  // 1, -1032
  }
}

/// One k-step of int8: byte - 128. Words: rows 0-3 and 4-7 of column g, then of g + 8.
template <int kStep>
__device__ __forceinline__ void int8_step(const uint4& v, const Registers& held, uint32_t (&a)[4]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t low = i == 0 ? v.x : v.z, high = i == 0 ? v.y : v.w;
#pragma unroll
    for (int j = 0; j < 2; ++j) {  // rows 3 and 7, 2 and 6; then 1 and 5, 0 and 4
      const int row = 3 - 2 * kStep - j;
      const uint32_t bytes = __byte_perm(low, high, row | (row + 4) << 8);
      a[i + 2 * j] = fma2(and_or(bytes, 0x00ff00ffu, held.half1024), 0x3c003c00u, 0xe480e480u);
    }
  }
}

__device__ __forceinline__ uint32_t word_of(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

/// One lane's share of a tile of a block, and what decodes it. `Code`: a LaneCode or alike.
template <Coding kCoding, typename Code>
struct LaneTileOf {
  static constexpr int kVectors = lane_vectors(kCoding);
  uint4 v[kVectors];
  uint32_t codes[2];  // CCQ: of the part whose steps are decoded

  /// A operands of k-step `kStep` of rows 32 kPart .. 32 kPart + 31; step 0 comes first.
  template <int kPart, int kStep>
  __device__ __forceinline__ void decode(const Code& code, const GroupScale& scale,
                                         const Registers& held, uint32_t (&a)[4]) {
    if constexpr (kCoding == Coding::kCcq) {
      if constexpr (kStep == 0) {
        codes[0] = code.template codes<0>(word_of(v[0], kPart), held);
        codes[1] = code.template codes<1>(word_of(v[0], kPart), held);
      }
      ccq_step<kStep>(codes, scale, held, a);
    } else if constexpr (kCoding == Coding::kInt4) {
      int4_step<kStep>(word_of(v[kPart / 2], 2 * (kPart % 2)),
                       word_of(v[kPart / 2], 2 * (kPart % 2) + 1), held, a);
    } else {
      int8_step<kStep>(v[kPart], held, a);
    }
  }
};

template <Coding kCoding, bool kExact>
using LaneTile = LaneTileOf<kCoding, LaneCode<kExact>>;

#endif  // __CUDACC__

}  // namespace fd::cuda

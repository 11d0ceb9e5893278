// Rows of bf16 to shared memory as float16 or as digits, for the persistent kernel (stream.cuh).
#pragma once

#include "canonical.cuh"
#include "stream_shape.h"

namespace fd::cuda::stream {

constexpr int kThreads = kStreamWarps * kWarp;
constexpr int kHeld = 8;  // 16-byte vectors of rows that a thread converts at once
static_assert(kStreamWidest <= kHeld * kThreads * 8);

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

/// Eight elements of a row, one of the eight vectors of a group of 64 that eight neighbouring lanes
/// hold, as two signed digits each. All lanes of the warp.
struct DigitVector {
  uint32_t high[2], low[2];  // of four elements: 2, 0, 3, 1
  float unit;                // what an integer of the group counts; NaN if an element is not finite
  int offset;                // -32 times the weights' multiples of the group's integers

  __device__ explicit DigitVector(const uint4& x) {
    unsigned top = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) top = __vmaxu2(top, word_of(x, i) & 0x7fff7fffu);
    top = max(top << 16, top & 0xffff0000u);
#pragma unroll
    for (int across = 1; across < 8; across *= 2) {
      top = max(top, __shfl_xor_sync(kFullMask, top, across));
    }
    const int exponent = static_cast<int>(top >> 23);
    const bool finite = exponent != 255, zero = exponent == 0;
    // 4 * top * scale is from 2^14 to below 2^15
    const int shift = zero || !finite ? 0 : min(12 + 127 - exponent, 124);
    const float scale = __uint_as_float(static_cast<uint32_t>(shift + 127) << 23);
    unit = finite ? __uint_as_float(static_cast<uint32_t>(125 - shift) << 23)
                  : __uint_as_float(0x7fffffffu);
    uint32_t sum = 0;
#pragma unroll
    for (int quad = 0; quad < 2; ++quad) {
      const float2 a = unpack_bf16(word_of(x, 2 * quad)), b = unpack_bf16(word_of(x, 2 * quad + 1));
      const uint32_t q[4] = {fixed(b.x, scale), fixed(a.x, 4.0f * scale), fixed(b.y, scale),
                             fixed(a.y, 4.0f * scale)};
      sum += 4 * (q[0] + q[2]) + q[1] + q[3];
      high[quad] = bytes<1>(q[0] + 128, q[1] + 128, q[2] + 128, q[3] + 128);
      low[quad] = bytes<0>(q[0], q[1], q[2], q[3]);
    }
    sum -= kAbove * (2 * (4 + 1 + 4 + 1));
#pragma unroll
    for (int across = 1; across < 8; across *= 2) {
      sum += __shfl_xor_sync(kFullMask, sum, across);
    }
    offset = -32 * static_cast<int>(sum);
  }

 private:
  static constexpr uint32_t kAbove = 0x4b400000;  // bits of 2^23 + 2^22, whose mantissa counts ones

  /// kAbove and a number of at most 127 * 256 + 127, what two signed digits hold; what is not a
  /// number gives some digits or other.
  __device__ static uint32_t fixed(float x, float scale) {
    return min(__float_as_int(__fmaf_rn(x, scale, 12582912.0f)), static_cast<int>(kAbove) + 32639);
  }

  /// One byte of each of four numbers.
  template <int kByte>
  __device__ static uint32_t bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    constexpr int kPick = kByte | (4 + kByte) << 4;
    return __byte_perm(__byte_perm(a, b, kPick), __byte_perm(c, d, kPick), 0x5410);
  }
};

/// Vector `i` of a row to its place, see stream_digits.cuh: [group of 64][digit][c][step of 32][8
/// rows], then for every group the unit of its integers and what makes good for fields that are 32
/// too large. All lanes of the warp. In one place: with a copy for each of eight vectors, and with
/// conversions to integers, a call of one token took 8 us longer.
__device__ __noinline__ inline void put_digits(uint4 x, int i, uint32_t row, int padded) {
  const DigitVector digits(x);
  const uint32_t at = row + i / 8 * 128 + i % 4 * 16 + i / 4 % 2 * 8;
  store_shared(at, digits.high[0], digits.high[1]);
  store_shared(at + 64, digits.low[0], digits.low[1]);
  if (i % 8 == 0) {
    store_shared(row + padded * 2 + i, __float_as_uint(digits.unit),
                 static_cast<uint32_t>(digits.offset));
  }
}

/// Some rows of bf16 on their way to shared memory: a thread holds `of_row` vectors of each.
struct Rows {
  uint4 v[kHeld];
  int of_row, at_once;

  __device__ explicit Rows(int padded)
      : of_row((padded / 8 + kThreads - 1) / kThreads), at_once(kHeld / of_row) {}

  /// Calls f(index, row, vector) for each vector of rows first .. first + at_once - 1 below count.
  template <typename F>
  __device__ __forceinline__ void each(int first, int count, int vectors, F f) const {
    int row = first, part = 0;
#pragma unroll
    for (int u = 0; u < kHeld; ++u) {
      const int i = threadIdx.x + part * kThreads;
      if (row < min(count, first + at_once)) f(u, row, i < vectors ? i : -1);
      if (++part == of_row) part = 0, ++row;
    }
  }

  /// `source`: a row's first vector.
  template <typename Source>
  __device__ __forceinline__ void load(int first, int count, int width, Source source) {
    each(first, count, width / 8, [&](int u, int row, int i) {
      v[u] = i >= 0 ? __ldcg(source(row) + i) : make_uint4(0, 0, 0, 0);
    });
  }

  __device__ __forceinline__ void find_tops(int first, int count, int width, unsigned* tops) const {
    each(first, count, width / 8, [&](int u, int row, int) {
      unsigned top = 0;  // of either half: bits of magnitudes are in their order
#pragma unroll
      for (int i = 0; i < 4; ++i) top = __vmaxu2(top, word_of(v[u], i) & 0x7fff7fffu);
      top = __reduce_max_sync(kFullMask, max(top << 16, top & 0xffff0000u));
      if (threadIdx.x % kWarp == 0) atomicMax(&tops[row], top);
    });
  }

  __device__ __forceinline__ void store(int first, int count, int padded, const unsigned* tops,
                                        uint32_t to, int stride) const {
    each(first, count, padded / 8, [&](int u, int row, int i) {
      const uint4 slots = to_slots(v[u], row_scale(__uint_as_float(tops[row])));
      if (i < 0) return;
      store_shared(to + row * stride + i * 16, slots);
    });
  }
};

#endif

}  // namespace fd::cuda::stream

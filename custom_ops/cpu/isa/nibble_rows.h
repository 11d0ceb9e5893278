// One or two rows times int4 tiles on AVX2.
//
// A product of bytes adds pairs in 16 bits. Those of eight quads still fit there: weights are at
// most 15, so that only every eighth sum has to be widened. 64 weights take 17 instructions for
// three digits and 12 for two; widening the sums of every second quad takes 21 and 15.
#pragma once

#include "weight_formats.h"

#if defined(FD_ISA_AVX2)

namespace fd::FD_ISA {

constexpr int kNibbleQuads = 8;  // 15 * 128 * 2 * 8 < 2^15

struct Nibbles {
  __m256i lo, hi;  // eight columns and eight more
};

// In place, not a sum of several products first, for which the compiler has no registers.
FD_INLINE void add_bytes(__m256i& sum, __m256i bytes, __m256i digits) {
  asm("vpaddw %1, %0, %0" : "+x"(sum) : "x"(_mm256_maddubs_epi16(bytes, digits)));
}

// sums[digit] += half a group of one row's products, in 16 bits; `digits`: of its first quad.
template <int kDigitCount, int kRows>
FD_INLINE void add_nibbles(const uint8_t* weights, const int8_t* const (&digits)[kRows],
                           Nibbles (&sums)[kRows][kDigitCount]) {
  const __m256i nibble = _mm256_set1_epi8(0x0f);
#pragma GCC unroll 4
  for (int q = 0; q < kNibbleQuads; q += 2) {
    const __m256i lo = _mm256_loadu_si256((const __m256i*)(weights + q * 32));
    const __m256i hi = _mm256_loadu_si256((const __m256i*)(weights + q * 32 + 32));
    const Nibbles even = {_mm256_and_si256(lo, nibble), _mm256_and_si256(hi, nibble)};
    const Nibbles odd = {_mm256_and_si256(_mm256_srli_epi16(lo, 4), nibble),
                         _mm256_and_si256(_mm256_srli_epi16(hi, 4), nibble)};
#pragma GCC unroll 2
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
      for (int d = 0; d < kDigitCount; ++d) {
        Nibbles& sum = sums[r][d];
        const int8_t* at = digits[r] + d * kGroupRows + 4 * q;
        const __m256i x = splat_digits(at), y = splat_digits(at + 4);
        add_bytes(sum.lo, even.lo, x);
        add_bytes(sum.hi, even.hi, x);
        add_bytes(sum.lo, odd.lo, y);
        add_bytes(sum.hi, odd.hi, y);
      }
    }
  }
}

// The sums of a group in 32 bits, for each digit.
template <int kDigitCount, int kRows>
FD_INLINE void sum_nibbles(const uint8_t* weights, const Row (&rows)[kRows], int64_t g,
                           I16 (&sums)[kRows][kDigitCount]) {
  const __m256i ones = _mm256_set1_epi16(1);
  for (int r = 0; r < kRows; ++r) {
    for (int d = 0; d < kDigitCount; ++d) sums[r][d] = splat_int(rows[r].groups[g].start[d]);
  }
#pragma GCC unroll 1
  for (int q = 0; q < kGroupQuads; q += kNibbleQuads) {
    Nibbles narrow[kRows][kDigitCount] = {};
    const int8_t* digits[kRows];
    for (int r = 0; r < kRows; ++r) digits[r] = rows[r].digits + g * kGroupDigitBytes + 4 * q;
    add_nibbles<kDigitCount, kRows>(weights + q * 32, digits, narrow);
    for (int r = 0; r < kRows; ++r) {
      for (int d = 0; d < kDigitCount; ++d) {
        I16& sum = sums[r][d];
        sum.lo = _mm256_add_epi32(sum.lo, _mm256_madd_epi16(narrow[r][d].lo, ones));
        sum.hi = _mm256_add_epi32(sum.hi, _mm256_madd_epi16(narrow[r][d].hi, ones));
      }
    }
  }
}

template <int kDigitCount, int kRows>
FD_INLINE void nibble_tile(const TileJob& job, int tile) {
  const Int4 format(job, tile);
  Row rows[kRows];
  F16 total[kRows];
  for (int r = 0; r < kRows; ++r) {
    rows[r] = row_of(job, r);
    total[r] = splat(0.0f);
  }
  const int64_t groups = job.depth / kGroupRows;
  for (int64_t g = 0; g < groups; ++g) {
    const uint8_t* weights = format.group(g);
    fetch_ahead<Int4, 1>(job, format.tile, weights);
    I16 sums[kRows][kDigitCount];
    sum_nibbles<kDigitCount, kRows>(weights, rows, g, sums);
    for (int r = 0; r < kRows; ++r) {
      total[r] = fma(join(sums[r]), splat(rows[r].groups[g].scale), total[r]);
    }
  }
  for (int r = 0; r < kRows; ++r) store_total(job, r, tile, groups, total[r]);
}

template <int kDigitCount, int kRows>
void multiply_nibbles(const TileJob& job) {
  const int tiles = (job.columns + kTileColumns - 1) / kTileColumns;
  for (int tile = 0; tile < tiles; ++tile) nibble_tile<kDigitCount, kRows>(job, tile);
}

// Up to two rows.
FD_INLINE void multiply_nibbles(const TileJob& job) {
  if (job.digit_count == kDigits) {
    job.num_rows == 1 ? multiply_nibbles<kDigits, 1>(job) : multiply_nibbles<kDigits, 2>(job);
  } else {
    job.num_rows == 1 ? multiply_nibbles<2, 1>(job) : multiply_nibbles<2, 2>(job);
  }
}

}  // namespace fd::FD_ISA

#endif

// One row times 2-bit tiles on AVX2, which has no product of four bytes.
//
// Two quads of rows are decoded side by side: a 32-bit lane holds the codes of one column's quads q
// and q + 1. Masks and one shift then give each field of both as 16-bit numbers, times 1 or 8, that
// one instruction multiplies by two activations of 16 bits and adds. So the three digits of an
// activation become two numbers, 256 h + m and l, and no field has to become a byte: 29 vector
// instructions for 64 weights instead of 36. All sums are exact and joined as elsewhere.
#pragma once

#include "weight_formats.h"

#if defined(FD_LANES_X86) && !defined(FD_LANES_512) && !defined(FD_ISA_AVXVNNI)
#define FD_PAIRED_ROWS 1

namespace fd::FD_ISA {

constexpr int kPairs = kGroupQuads / 2;
constexpr int kNumbers = 2;  // of an activation: 256 h + m, and l
// Groups whose numbers are made at a time: 16 KiB, half of a small L1 cache.
constexpr int kPairGroups = 64;

// [number][pair][field]: the activation of that field in both quads of the pair.
struct PairedGroup {
  alignas(32) int32_t at[kNumbers][kPairs][4];
};

// Rows 0 .. 3 of two quads as (0, 0'), (1, 1'), (2, 2'), (3, 3').
FD_INLINE void store_paired(int32_t* to, __m256i numbers) {
  const __m128i order = _mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15);
  _mm256_store_si256((__m256i*)to,
                     _mm256_shuffle_epi8(numbers, _mm256_broadcastsi128_si256(order)));
}
FD_INLINE __m256i load_digits(const int8_t* p) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p));
}
FD_INLINE void pair_digits(const int8_t* digits, PairedGroup& to) {
  for (int i = 0; i < kGroupRows; i += 16) {
    const __m256i high = _mm256_slli_epi16(load_digits(digits + i), 8);
    store_paired(to.at[0][i / 8], _mm256_add_epi16(high, load_digits(digits + kGroupRows + i)));
    store_paired(to.at[1][i / 8], load_digits(digits + 2 * kGroupRows + i));
  }
}

// Sums of eight columns: of fields times 1 and times 8, for each number.
struct PairSums {
  __m256i one[kNumbers], eight[kNumbers];

  __attribute__((always_inline)) void add(const PairedGroup& x, int pair, __m256i codes) {
    const __m256i upper = _mm256_srli_epi16(codes, 6);
    const __m256i one_mask = _mm256_set1_epi16(ccq::kFieldMask);
    const __m256i eight_mask = _mm256_set1_epi16(ccq::kFieldMask << 3);
    const __m256i fields[4] = {
        _mm256_and_si256(upper, eight_mask), _mm256_and_si256(upper, one_mask),
        _mm256_and_si256(codes, eight_mask), _mm256_and_si256(codes, one_mask)};
    for (int n = 0; n < kNumbers; ++n) {
      const int32_t* at = x.at[n][pair];
      for (int f = 0; f < 4; ++f) {
        __m256i& sum = f % 2 ? one[n] : eight[n];
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(fields[f], _mm256_set1_epi32(at[f])));
      }
      // Else the compiler adds products of several pairs first, and has no registers for them.
      asm volatile("" : "+x"(one[n]), "+x"(eight[n])::"memory");
    }
  }
  __attribute__((always_inline)) __m256i whole(int n) const {
    return _mm256_add_epi32(one[n], _mm256_srai_epi32(eight[n], 3));
  }
};

template <int kHalf, typename Decoder>
FD_INLINE void add_half(const Decoder& decoder, const uint8_t* group, const PairedGroup& x,
                        __m256i (&sums)[kNumbers]) {
  PairSums found{};
#pragma GCC unroll 1
  for (int v = 0; v < kGroupQuads / kQuadsPerVector; ++v) {
    const __m256i bytes = _mm256_loadu_si256((const __m256i*)(group + v * 64 + kHalf * 32));
    found.add(x, 2 * v, decoder.template two_codes<kHalf>(bytes, 0));
    found.add(x, 2 * v + 1, decoder.template two_codes<kHalf>(bytes, 2));
  }
  for (int n = 0; n < kNumbers; ++n) sums[n] = found.whole(n);
}

// Groups [begin, end) of one tile, whose numbers are `x`.
template <typename Format>
FD_INLINE void pair_tile(const TileJob& job, int tile, int64_t begin, int64_t end,
                         const PairedGroup* x) {
  const Format format(job, tile);
  const GroupNumbers* groups = row_of(job, 0).groups;
  F16 total = begin == 0 ? splat(0.0f) : load_total(job, 0, tile);
  for (int64_t g = begin; g < end; ++g) {
    const uint8_t* weights = format.group(g);
    fetch_ahead<Format, 1>(job, format.tile, weights);
    __m256i low[kNumbers], high[kNumbers];
    add_half<0>(format.decoder, weights, x[g - begin], low);
    asm volatile("" ::: "memory");
    add_half<1>(format.decoder, weights, x[g - begin], high);
    const int32_t* start = groups[g].start;
    const I16 upper = add(I16{low[0], high[0]}, splat_int(256 * start[0] + start[1]));
    const I16 lower = add(I16{low[1], high[1]}, splat_int(start[2]));
    const F16 sum = fma(to_float(upper), splat(256.0f), to_float(lower));
    total = fma(sum, Format::factor(format.local(g), splat(groups[g].scale)), total);
  }
  store_total(job, 0, tile, end, total);
}

template <typename Format>
void multiply_pairs(const TileJob& job) {
  PairedGroup x[kPairGroups];
  const int64_t groups = job.depth / kGroupRows;
  const int tiles = (job.columns + kTileColumns - 1) / kTileColumns;
  for (int64_t begin = 0; begin < groups; begin += kPairGroups) {
    const int64_t end = begin + kPairGroups < groups ? begin + kPairGroups : groups;
    for (int64_t g = begin; g < end; ++g) {
      pair_digits(row_of(job, 0).digits + g * kGroupDigitBytes, x[g - begin]);
    }
    for (int tile = 0; tile < tiles; ++tile) pair_tile<Format>(job, tile, begin, end, x);
  }
}

}  // namespace fd::FD_ISA

#endif

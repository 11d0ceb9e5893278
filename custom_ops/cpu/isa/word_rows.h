// One row times 2-bit tiles in 16-bit words, for processors with vectors of 32 bytes.
//
// A 32-bit lane holds the codes of one column's quads q and q + 2 of a group. Masks and one shift
// give each field of both as 16-bit numbers, times 1 or 8, which one instruction multiplies by two
// activations of 16 bits and adds. So the three digits of an activation become two numbers,
// 256 h + m and l, and no field has to become a byte. All sums are exact and joined as elsewhere.
#pragma once

#include "weight_formats.h"

#if defined(FD_LANES_X86) && !defined(FD_LANES_512)
#define FD_WORD_ROWS 1

namespace fd::FD_ISA {

// --- activations ---------------------------------------------------------------------------------

constexpr int kPairs = kGroupQuads / 2;
// Of an activation: 256 h + m, and l unless that is always zero.
constexpr int kNumbers = 2;
// Groups whose numbers are made at a time: 32 KiB, which a loop over 16 columns reads once. A tile
// that was left and taken up again would be fetched badly: [8192, 7168] was 1.12 times as slow with
// half as many.
constexpr int kWordGroups = 128;

// [pair of quads 0 and 2, 1 and 3, 4 and 6, ...][field][number]: the activations of both quads.
template <int kCount>
struct alignas(32) WordGroup {
  int32_t at[kPairs][4][kCount];
};

FD_INLINE __m256i load_digits(const int8_t* p) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p));
}
// Of 16 rows, whose digits begin at `digits`.
FD_INLINE __m256i upper_numbers(const int8_t* digits) {
  const __m256i high = _mm256_slli_epi16(load_digits(digits), 8);
  return _mm256_add_epi16(high, load_digits(digits + kGroupRows));
}
FD_INLINE __m256i lower_numbers(const int8_t* digits) {
  return load_digits(digits + 2 * kGroupRows);
}
FD_INLINE __m128i low_half(__m256i v) { return _mm256_castsi256_si128(v); }
FD_INLINE __m128i high_half(__m256i v) { return _mm256_extracti128_si256(v, 1); }

// One pair's activations [field] of each number.
FD_INLINE void store_pair(int32_t (*to)[1], __m128i upper, __m128i) {
  _mm_store_si128((__m128i*)to, upper);
}
FD_INLINE void store_pair(int32_t (*to)[2], __m128i upper, __m128i lower) {
  _mm_store_si128((__m128i*)to, _mm_unpacklo_epi32(upper, lower));
  _mm_store_si128((__m128i*)to + 1, _mm_unpackhi_epi32(upper, lower));
}
template <int kCount>
FD_INLINE void word_digits(const int8_t* digits, WordGroup<kCount>& to) {
  for (int i = 0; i < kGroupRows; i += 16) {
    const __m256i upper = upper_numbers(digits + i), lower = lower_numbers(digits + i);
    store_pair(to.at[i / 8], _mm_unpacklo_epi16(low_half(upper), high_half(upper)),
               _mm_unpacklo_epi16(low_half(lower), high_half(lower)));
    store_pair(to.at[i / 8 + 1], _mm_unpackhi_epi16(low_half(upper), high_half(upper)),
               _mm_unpackhi_epi16(low_half(lower), high_half(lower)));
  }
}

// --- products ------------------------------------------------------------------------------------

FD_INLINE __m256i add_products(__m256i sum, __m256i fields, __m256i numbers) {
#if defined(FD_ISA_AVXVNNI)
  return _mm256_dpwssd_avx_epi32(sum, fields, numbers);
#else
  return _mm256_add_epi32(sum, _mm256_madd_epi16(fields, numbers));
#endif
}

// The same, and not a sum of several products first, for which the compiler has no registers.
FD_INLINE void add_in_place(__m256i& sum, __m256i fields, __m256i numbers) {
#if defined(FD_ISA_AVXVNNI)
  sum = _mm256_dpwssd_avx_epi32(sum, fields, numbers);
#else
  asm("vpaddd %1, %0, %0" : "+x"(sum) : "x"(_mm256_madd_epi16(fields, numbers)));
#endif
}

// The codes of a group's pairs, eight columns and eight more. Products wait for them in memory:
// were each pair multiplied as soon as it is decoded, the processor could not look far enough ahead
// to keep its ports busy.
struct alignas(32) WordCodes {
  __m256i of[kPairs][2];

  template <typename Decoder>
  FD_ALWAYS_INLINE void decode(const Decoder& decoder, const uint8_t* group) {
    for (int v = 0; v < kGroupQuads / kQuadsPerVector; ++v) {
      const __m256i lo = _mm256_loadu_si256((const __m256i*)(group + v * 64));
      const __m256i hi = _mm256_loadu_si256((const __m256i*)(group + v * 64 + 32));
      of[2 * v][0] = decoder.lo.codes(lo, false);
      of[2 * v][1] = decoder.hi.codes(hi, false);
      of[2 * v + 1][0] = decoder.lo.codes(lo, true);
      of[2 * v + 1][1] = decoder.hi.codes(hi, true);
    }
    asm volatile("" : : "r"(this) : "memory");
  }
};

// Words of 16 columns times the numbers of an activation.
FD_INLINE void add_words(I16& upper, I16&, __m256i lo, __m256i hi, const int32_t (&numbers)[1]) {
  const __m256i high = _mm256_set1_epi32(numbers[0]);
  add_in_place(upper.lo, lo, high);
  add_in_place(upper.hi, hi, high);
}
FD_INLINE void add_words(I16& upper, I16& lower, __m256i lo, __m256i hi,
                         const int32_t (&numbers)[2]) {
  const __m256i high = _mm256_set1_epi32(numbers[0]), low = _mm256_set1_epi32(numbers[1]);
  upper.lo = add_products(upper.lo, lo, high);
  upper.hi = add_products(upper.hi, hi, high);
  lower.lo = add_products(lower.lo, lo, low);
  lower.hi = add_products(lower.hi, hi, low);
  // Else the compiler adds products of several words first, and has no registers for them. For one
  // row of int8 this is 4 % faster than adding in place.
  asm volatile("" : "+x"(upper.lo), "+x"(upper.hi), "+x"(lower.lo), "+x"(lower.hi));
}

FD_INLINE I16 upper_start(const GroupNumbers& group) {
  return splat_int(256 * group.start[0] + group.start[1]);
}
FD_INLINE I16 lower_start(const GroupNumbers& group) { return splat_int(group.start[2]); }
FD_INLINE F16 join_numbers(I16 upper, I16 lower) {
  return fma(to_float(upper), splat(256.0f), to_float(lower));
}

FD_INLINE I16 with_eighth(I16 one, I16 eight) {
  return {_mm256_add_epi32(one.lo, _mm256_srai_epi32(eight.lo, 3)),
          _mm256_add_epi32(one.hi, _mm256_srai_epi32(eight.hi, 3))};
}

// The sums of a group of 16 columns, for each number of the activations.
template <int kCount>
FD_INLINE void sum_group(const WordCodes& codes, const WordGroup<kCount>& x, I16& upper,
                         I16& lower) {
  const __m256i one_mask = _mm256_set1_epi16(ccq::kFieldMask);
  const __m256i eight_mask = _mm256_set1_epi16(ccq::kFieldMask << 3);
  I16 upper_one = upper, lower_one = lower;
  I16 upper_eight = splat_int(0), lower_eight = splat_int(0);
#pragma GCC unroll 1
  for (int pair = 0; pair < kPairs; ++pair) {
    const __m256i lo = codes.of[pair][0], hi = codes.of[pair][1];
    const __m256i high_lo = _mm256_srli_epi16(lo, 6), high_hi = _mm256_srli_epi16(hi, 6);
    const auto& at = x.at[pair];
    add_words(upper_eight, lower_eight, _mm256_and_si256(high_lo, eight_mask),
              _mm256_and_si256(high_hi, eight_mask), at[0]);
    add_words(upper_one, lower_one, _mm256_and_si256(high_lo, one_mask),
              _mm256_and_si256(high_hi, one_mask), at[1]);
    add_words(upper_eight, lower_eight, _mm256_and_si256(lo, eight_mask),
              _mm256_and_si256(hi, eight_mask), at[2]);
    add_words(upper_one, lower_one, _mm256_and_si256(lo, one_mask), _mm256_and_si256(hi, one_mask),
              at[3]);
  }
  upper = with_eighth(upper_one, upper_eight);
  lower = with_eighth(lower_one, lower_eight);
}

// Groups [begin, end) of one tile, whose numbers are `x`.
template <typename Format, int kCount>
FD_INLINE void word_tile(const TileJob& job, int tile, int64_t begin, int64_t end,
                         const WordGroup<kCount>* x) {
  const Format format(job, tile);
  const GroupNumbers* groups = row_of(job, 0).groups;
  F16 total = begin == 0 ? splat(0.0f) : load_total(job, 0, tile);
  WordCodes codes;
  for (int64_t g = begin; g < end; ++g) {
    const uint8_t* weights = format.group(g);
    fetch_ahead<Format, 1>(job, format.tile, weights);
    codes.decode(format.decoder, weights);
    I16 upper = upper_start(groups[g]), lower = lower_start(groups[g]);
    sum_group(codes, x[g - begin], upper, lower);
    const F16 factor = Format::factor(format.local(g), splat(groups[g].scale));
    total = fma(join_numbers(upper, lower), factor, total);
  }
  store_total(job, 0, tile, end, total);
}

template <typename Format, int kCount>
FD_INLINE void multiply_numbers(const TileJob& job) {
  WordGroup<kCount> x[kWordGroups];
  const int64_t groups = job.depth / kGroupRows;
  const int tiles = (job.columns + kTileColumns - 1) / kTileColumns;
  for (int64_t begin = 0; begin < groups; begin += kWordGroups) {
    const int64_t end = begin + kWordGroups < groups ? begin + kWordGroups : groups;
    for (int64_t g = begin; g < end; ++g) {
      word_digits(row_of(job, 0).digits + g * kGroupDigitBytes, x[g - begin]);
    }
    for (int tile = 0; tile < tiles; ++tile) word_tile<Format>(job, tile, begin, end, x);
  }
}

template <typename Format>
void multiply_words(const TileJob& job) {
  job.digit_count == kDigits ? multiply_numbers<Format, kNumbers>(job)
                             : multiply_numbers<Format, 1>(job);
}

}  // namespace fd::FD_ISA

#endif

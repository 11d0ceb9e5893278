// Some rows times tiles of 4- and 2-bit weights on AVX2: mostly in 16-bit words.
//
// A group of a tile is decoded once and used for all rows of a block: into words, pairs of rows of
// one column, which meet 256 h + m of two activations in one instruction, and into bytes, which
// meet their last digits. A row's two sums are formed one after the other, so that those of four
// rows find room in the registers, and what is loaded serves all four. 64 weights so take 13
// instructions on vectors, of which 7 multiply; three digits in bytes take 15 and 9, two words 16
// and 8. Two digits take 8 and 4.
#pragma once

#include "word_rows.h"

#if defined(FD_ISA_AVX2)

namespace fd::FD_ISA {

constexpr int kWordPairs = kGroupRows / 2;

// A decoded group: words and bytes of eight columns and eight more.
struct alignas(64) WordWeights {
  __m256i words[kWordPairs][2];
  __m256i bytes[kGroupQuads][2];
};

// The numbers of one group of one row, in the order of the weights that they meet: 256 h + m, and
// where there are three digits the last ones.
template <int kDigitCount>
struct alignas(64) BlockNumbers {
  static constexpr int kAll = kWordPairs + (kDigitCount == kDigits ? kGroupQuads : 0);
  int32_t at[kAll];
};

// --- formats -------------------------------------------------------------------------------------

template <typename Format>
struct InWords;

// As nibbles follow one another in a word: rows 0 and 2 of an even quad, of the odd one, then 1 and
// 3 of both.
template <>
struct InWords<Int4> {
  static void decode(const Int4&, const uint8_t* group, WordWeights& to) {
    const __m256i nibble = _mm256_set1_epi16(0x0f), nibbles = _mm256_set1_epi8(0x0f);
    for (int q = 0; q < kGroupQuads; q += 2) {
      for (int half = 0; half < 2; ++half) {
        const __m256i both = _mm256_loadu_si256((const __m256i*)(group + q * 32) + half);
        const __m256i even = _mm256_and_si256(both, nibbles);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi16(both, 4), nibbles);
        to.words[2 * q][half] = _mm256_and_si256(even, nibble);
        to.words[2 * q + 1][half] = _mm256_and_si256(odd, nibble);
        to.words[2 * q + 2][half] = _mm256_srli_epi16(even, 8);
        to.words[2 * q + 3][half] = _mm256_srli_epi16(odd, 8);
        to.bytes[q][half] = even;
        to.bytes[q + 1][half] = odd;
      }
    }
  }
  static __m256i ordered(__m256i numbers) {
    return _mm256_shuffle_epi8(numbers, _mm256_broadcastsi128_si256(_mm_setr_epi8(
                                            0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15)));
  }
  static __m128i ordered_bytes(__m128i digits) { return digits; }
};

// As in word_rows.h: a field of quad q and the same of q + 2. Bytes: fields 0 and 1 of both, then 2
// and 3.
template <typename Decoder>
struct InWords<Ccq<Decoder>> {
  template <typename Words>
  static FD_ALWAYS_INLINE void decode_half(const Words& words, __m256i bytes, int pair, int half,
                                           WordWeights& to) {
    for (int odd = 0; odd < 2; ++odd) {
      const __m256i code = words.codes(bytes, odd), mask = _mm256_set1_epi16(ccq::kFieldMask);
      const __m256i field[4] = {_mm256_and_si256(_mm256_srli_epi16(code, 9), mask),
                                _mm256_and_si256(_mm256_srli_epi16(code, 6), mask),
                                _mm256_and_si256(_mm256_srli_epi16(code, 3), mask),
                                _mm256_and_si256(code, mask)};
      for (int j = 0; j < 4; ++j) to.words[4 * (pair + odd) + j][half] = field[j];
      for (int j = 0; j < 2; ++j) {
        to.bytes[2 * (pair + odd) + j][half] =
            _mm256_or_si256(field[2 * j], _mm256_slli_epi16(field[2 * j + 1], 8));
      }
    }
  }
  static void decode(const Ccq<Decoder>& format, const uint8_t* group, WordWeights& to) {
    for (int v = 0; v < kGroupQuads / kQuadsPerVector; ++v) {
      const __m256i* bytes = (const __m256i*)(group + v * 64);
      decode_half(format.decoder.lo, _mm256_loadu_si256(bytes), 2 * v, 0, to);
      decode_half(format.decoder.hi, _mm256_loadu_si256(bytes + 1), 2 * v, 1, to);
    }
  }
  static __m256i ordered(__m256i numbers) {
    const __m128i low = low_half(numbers), high = high_half(numbers);
    return _mm256_set_m128i(_mm_unpackhi_epi16(low, high), _mm_unpacklo_epi16(low, high));
  }
  static __m128i ordered_bytes(__m128i digits) {
    return _mm_shuffle_epi8(digits,
                            _mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15));
  }
};

template <typename Format, int kDigitCount>
FD_INLINE void fill_numbers(const int8_t* digits, BlockNumbers<kDigitCount>& to) {
  for (int i = 0; i < kGroupRows; i += 16) {
    const __m256i upper = InWords<Format>::ordered(upper_numbers(digits + i));
    _mm256_store_si256((__m256i*)(to.at + i / 2), upper);
    if constexpr (kDigitCount == kDigits) {
      const __m128i last = _mm_loadu_si128((const __m128i*)(digits + 2 * kGroupRows + i));
      const __m128i lower = InWords<Format>::ordered_bytes(last);
      _mm_store_si128((__m128i*)(to.at + kWordPairs + i / 4), lower);
    }
  }
}

// --- products ------------------------------------------------------------------------------------

// sums[r] += the words times numbers[r * kStride + pair]
template <int kStride, int kRows>
FD_INLINE void add_words_of(const __m256i (&words)[kWordPairs][2], const int32_t* numbers,
                            I16 (&sums)[kRows]) {
  constexpr int kStep = 4;
  for (int pair = 0; pair < kWordPairs; pair += kStep) {
#pragma GCC unroll 4
    for (int i = 0; i < kStep; ++i) {
      const __m256i lo = words[pair + i][0], hi = words[pair + i][1];
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const __m256i number = _mm256_set1_epi32(numbers[r * kStride + pair + i]);
        add_in_place(sums[r].lo, lo, number);
        add_in_place(sums[r].hi, hi, number);
      }
    }
  }
}

// The same for bytes up to 63 and digits: two quads' products are added in 16 bits.
template <int kStride, int kRows>
FD_INLINE void add_bytes_of(const __m256i (&bytes)[kGroupQuads][2], const int32_t* digits,
                            I16 (&sums)[kRows]) {
  const __m256i ones = _mm256_set1_epi16(1);
  for (int q = 0; q < kGroupQuads; q += 2) {
    const __m256i even_lo = bytes[q][0], even_hi = bytes[q][1];
    const __m256i odd_lo = bytes[q + 1][0], odd_hi = bytes[q + 1][1];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const __m256i even = _mm256_set1_epi32(digits[r * kStride + q]);
      const __m256i odd = _mm256_set1_epi32(digits[r * kStride + q + 1]);
      const __m256i lo =
          _mm256_add_epi16(_mm256_maddubs_epi16(even_lo, even), _mm256_maddubs_epi16(odd_lo, odd));
      const __m256i hi =
          _mm256_add_epi16(_mm256_maddubs_epi16(even_hi, even), _mm256_maddubs_epi16(odd_hi, odd));
      add_in_place(sums[r].lo, lo, ones);
      add_in_place(sums[r].hi, hi, ones);
    }
  }
}

// What a group adds to the totals of kRows rows, whose group numbers are `stride` apart.
template <int kDigitCount, int kRows>
__attribute__((noinline)) void add_block(const WordWeights& weights,
                                         const BlockNumbers<kDigitCount>* x,
                                         const GroupNumbers* group, int64_t stride,
                                         const F16& local, float* totals) {
  constexpr int kStride = BlockNumbers<kDigitCount>::kAll;
  I16 upper[kRows], lower[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) upper[r] = upper_start(group[r * stride]);
  add_words_of<kStride, kRows>(weights.words, x->at, upper);
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) lower[r] = lower_start(group[r * stride]);
  if constexpr (kDigitCount == kDigits) {
    add_bytes_of<kStride, kRows>(weights.bytes, x->at + kWordPairs, lower);
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    float* total = totals + r * kTileColumns;
    const F16 factor = mul(local, splat(group[r * stride].scale));
    store(total, fma(join_numbers(upper[r], lower[r]), factor, load(total)));
  }
}

constexpr int kBlockRows = 4;

template <int kDigitCount, int kRows>
FD_INLINE void add_rest(int rows, const WordWeights& weights, const BlockNumbers<kDigitCount>* x,
                        const GroupNumbers* group, int64_t stride, const F16& local,
                        float* totals) {
  if constexpr (kRows > 0) {
    if (rows == kRows)
      return add_block<kDigitCount, kRows>(weights, x, group, stride, local, totals);
    add_rest<kDigitCount, kRows - 1>(rows, weights, x, group, stride, local, totals);
  }
}

template <int kDigitCount>
FD_INLINE void add_rows(const TileJob& job, const WordWeights& weights,
                        const BlockNumbers<kDigitCount>* x, int64_t g, const F16& local,
                        float* totals) {
  const int64_t stride = job.depth / kGroupRows;
  const GroupNumbers* group = job.groups + g;
  int i = 0;
  for (; i + kBlockRows <= job.num_rows; i += kBlockRows) {
    add_block<kDigitCount, kBlockRows>(weights, x + i, group + i * stride, stride, local,
                                       totals + i * kTileColumns);
  }
  add_rest<kDigitCount, kBlockRows - 1>(job.num_rows - i, weights, x + i, group + i * stride,
                                        stride, local, totals + i * kTileColumns);
}

// --- tiles ---------------------------------------------------------------------------------------

// Rows that share a decoded group, and memory for the numbers of some groups of them: half of a
// small L2 cache, which they stay in while the tiles pass by.
constexpr int kSharingRows = 64;
constexpr int64_t kNumberBytes = 1 << 18;

// Groups [begin, end) of one tile; the numbers of group g begin at x + (g - begin) * rows.
template <typename Format, int kDigitCount>
void block_tile(const TileJob& job, int tile, int64_t begin, int64_t end,
                const BlockNumbers<kDigitCount>* x) {
  const Format format(job, tile);
  alignas(64) float totals[kSharingRows * kTileColumns];
  WordWeights weights;
  const int rows = job.num_rows;
  for (int i = 0; i < rows; ++i) {
    store(totals + i * kTileColumns, begin == 0 ? splat(0.0f) : load_total(job, i, tile));
  }
  for (int64_t g = begin; g < end; ++g) {
    const uint8_t* group = format.group(g);
    fetch_ahead<Format, 1, 2>(job, format.tile, group);
    InWords<Format>::decode(format, group, weights);
    add_rows(job, weights, x + (g - begin) * rows, g, format.local(g), totals);
  }
  for (int i = 0; i < rows; ++i) {
    store_total(job, i, tile, end, load(totals + i * kTileColumns));
  }
}

template <typename Format, int kDigitCount>
void multiply_block(const TileJob& job, uint8_t* memory) {
  auto* x = (BlockNumbers<kDigitCount>*)memory;
  const int64_t groups = job.depth / kGroupRows, rows = job.num_rows;
  const int64_t step = kNumberBytes / (rows * (int64_t)sizeof(*x));
  const int tiles = (job.columns + kTileColumns - 1) / kTileColumns;
  for (int64_t begin = 0; begin < groups; begin += step) {
    const int64_t end = begin + step < groups ? begin + step : groups;
    for (int64_t i = 0; i < rows; ++i) {
      const int8_t* digits = row_of(job, (int)i).digits;
      for (int64_t g = begin; g < end; ++g) {
        fill_numbers<Format>(digits + g * kGroupDigitBytes, x[(g - begin) * rows + i]);
      }
    }
    for (int tile = 0; tile < tiles; ++tile) block_tile<Format>(job, tile, begin, end, x);
  }
}

template <typename Format, int kDigitCount>
void multiply_blocks(const TileJob& job) {
  alignas(64) static thread_local uint8_t memory[kNumberBytes];
  for (int first = 0; first < job.num_rows; first += kSharingRows) {
    const int left = job.num_rows - first;
    multiply_block<Format, kDigitCount>(
        rows_of(job, first, left < kSharingRows ? left : kSharingRows), memory);
  }
}

}  // namespace fd::FD_ISA

#endif

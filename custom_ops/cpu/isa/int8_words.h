// int8 tiles on AVX2, whose product of bytes would overflow: in 16-bit words instead.
//
// A mask and a shift make words of the bytes of a quad, rows 0 and 2 of each column and rows 1 and
// 3, and two activations of 16 bits meet them in one instruction: two numbers in place of the three
// digits, as in word_rows.h. 64 weights take 20 instructions; as nibbles and digits they took 33.
#pragma once

#include "word_rows.h"

#if defined(FD_ISA_AVX2)

namespace fd::FD_ISA {

// [quad][rows 0 and 2, 1 and 3][number]: the activations of both rows.
template <int kCount>
struct alignas(32) Int8Group {
  int32_t at[kGroupQuads][2][kCount];

  void fill(const int8_t* digits) {
    const __m256i order = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15));
    for (int i = 0; i < kGroupRows; i += 16) {
      const __m256i upper = _mm256_shuffle_epi8(upper_numbers(digits + i), order);
      __m256i* to = (__m256i*)at[i / 4];
      if constexpr (kCount == 1) {
        _mm256_store_si256(to, upper);
        continue;
      }
      const __m256i lower = _mm256_shuffle_epi8(lower_numbers(digits + i), order);
      const __m256i even = _mm256_unpacklo_epi32(upper, lower);
      const __m256i odd = _mm256_unpackhi_epi32(upper, lower);
      _mm256_store_si256(to, _mm256_permute2x128_si256(even, odd, 0x20));
      _mm256_store_si256(to + 1, _mm256_permute2x128_si256(even, odd, 0x31));
    }
  }
};

// Up to so many rows use weights as fast as memory gives them, for which the L1 cache has not
// enough fetches under way: into the L2 cache, and further ahead, one row takes 0.7 to 0.9 of the
// time, and eight rows 1.03.
constexpr int kFetchedFar = 2;
constexpr int64_t kInt8FetchAhead = 8192;

// Rows and groups of them whose numbers are made at a time: 128 KiB, half of a small L2 cache.
constexpr int kInt8Rows = 32;
constexpr int kInt8Groups = 512;

// What a group of kRows rows adds to their totals of one tile.
template <int kCount, int kRows>
FD_INLINE void add_int8_group(const uint8_t* weights, const Int8Group<kCount>* const (&x)[kRows],
                              const GroupNumbers* const (&numbers)[kRows], float* totals) {
  const __m256i low_bytes = _mm256_set1_epi16(0xff);
  I16 upper[kRows], lower[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    upper[r] = upper_start(*numbers[r]);
    lower[r] = lower_start(*numbers[r]);
  }
#pragma GCC unroll 1
  for (int q = 0; q < kGroupQuads; ++q) {
    const __m256i lo = _mm256_loadu_si256((const __m256i*)(weights + q * 64));
    const __m256i hi = _mm256_loadu_si256((const __m256i*)(weights + q * 64 + 32));
    const __m256i even_lo = _mm256_and_si256(lo, low_bytes), odd_lo = _mm256_srli_epi16(lo, 8);
    const __m256i even_hi = _mm256_and_si256(hi, low_bytes), odd_hi = _mm256_srli_epi16(hi, 8);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      add_words(upper[r], lower[r], even_lo, even_hi, x[r]->at[q][0]);
      add_words(upper[r], lower[r], odd_lo, odd_hi, x[r]->at[q][1]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    float* total = totals + r * kTileColumns;
    const F16 sum = join_numbers(upper[r], lower[r]);
    store(total, fma(sum, splat(numbers[r]->scale), load(total)));
  }
}

// Groups [begin, end) of one tile; row i's numbers begin at x + i * (end - begin).
template <int kCount>
FD_INLINE void int8_tile(const TileJob& job, int tile, int64_t begin, int64_t end,
                         const Int8Group<kCount>* x) {
  const Int8 format(job, tile);
  alignas(32) float totals[kInt8Rows * kTileColumns];
  const int rows = job.num_rows;
  const int64_t groups = job.depth / kGroupRows, count = end - begin;
  for (int i = 0; i < rows; ++i) {
    store(totals + i * kTileColumns, begin == 0 ? splat(0.0f) : load_total(job, i, tile));
  }
  for (int64_t g = begin; g < end; ++g) {
    const uint8_t* weights = format.group(g);
    if (rows <= kFetchedFar) {
      fetch_ahead<Int8, 1, 2, kInt8FetchAhead>(job, format.tile, weights);
    } else {
      fetch_ahead<Int8, 1>(job, format.tile, weights);
    }
    const Int8Group<kCount>* of_group = x + (g - begin);
    const GroupNumbers* numbers = job.groups + g;
    int i = 0;
    if constexpr (kCount == 1) {
      for (; i + 4 <= rows; i += 4) {
        const Int8Group<kCount>* at = of_group + i * count;
        const GroupNumbers* n = numbers + i * groups;
        add_int8_group<kCount, 4>(weights, {at, at + count, at + 2 * count, at + 3 * count},
                                  {n, n + groups, n + 2 * groups, n + 3 * groups},
                                  totals + i * kTileColumns);
      }
    }
    for (; i + 2 <= rows; i += 2) {
      add_int8_group<kCount, 2>(weights, {of_group + i * count, of_group + (i + 1) * count},
                                {numbers + i * groups, numbers + (i + 1) * groups},
                                totals + i * kTileColumns);
    }
    if (i < rows) {
      add_int8_group<kCount, 1>(weights, {of_group + i * count}, {numbers + i * groups},
                                totals + i * kTileColumns);
    }
  }
  for (int i = 0; i < rows; ++i) {
    store_total(job, i, tile, end, load(totals + i * kTileColumns));
  }
}

template <int kCount>
FD_INLINE void multiply_int8_block(const TileJob& job, Int8Group<kCount>* x) {
  const int64_t groups = job.depth / kGroupRows, step = kInt8Groups / job.num_rows;
  const int tiles = (job.columns + kTileColumns - 1) / kTileColumns;
  for (int64_t begin = 0; begin < groups; begin += step) {
    const int64_t end = begin + step < groups ? begin + step : groups;
    Int8Group<kCount>* to = x;
    for (int i = 0; i < job.num_rows; ++i) {
      const int8_t* digits = row_of(job, i).digits;
      for (int64_t g = begin; g < end; ++g) to++->fill(digits + g * kGroupDigitBytes);
    }
    for (int tile = 0; tile < tiles; ++tile) int8_tile(job, tile, begin, end, x);
  }
}

template <int kCount>
void multiply_int8_words(const TileJob& job) {
  static thread_local Int8Group<kCount> x[kInt8Groups];
  for (int first = 0; first < job.num_rows; first += kInt8Rows) {
    const int left = job.num_rows - first;
    multiply_int8_block(rows_of(job, first, left < kInt8Rows ? left : kInt8Rows), x);
  }
}

}  // namespace fd::FD_ISA

#endif

// Linear maps over packed weights: tiles of 16 columns times a block of rows.
#include "../linear_kernels.h"
#include "amx_rows.h"
#include "int8_words.h"
#include "nibble_rows.h"
#include "vector_rows.h"
#include "weight_formats.h"
#include "word_blocks.h"
#include "word_rows.h"

namespace fd::FD_ISA {
namespace {

// --- quantised weights ---------------------------------------------------------------------------

template <typename Format, int kDigitCount>
FD_INLINE void quantized_rows(const TileJob& job) {
#if defined(FD_ISA_AVX2)
  multiply_blocks<Format, kDigitCount>(job);
#else
  if (job.num_rows <= kRowBlock) return stream_tiles<Format, kDigitCount>(job);
#if defined(FD_ISA_AMX)
  multiply_by_tiles<Format, kDigitCount>(job);
#else
  multiply_by_vectors<Format, kDigitCount>(job);
#endif
#endif
}

template <typename Format>
void quantized_tiles(const TileJob& job) {
#if !defined(FD_ISA_PLAIN)
  if (job.digit_count < kDigits) return quantized_rows<Format, 2>(job);
#endif
  quantized_rows<Format, kDigits>(job);
}

void int8_tiles(const TileJob& job) {
#ifdef FD_ISA_AVX2
  job.digit_count == kDigits ? multiply_int8_words<kNumbers>(job) : multiply_int8_words<1>(job);
#else
  quantized_tiles<Int8>(job);
#endif
}

void int4_tiles(const TileJob& job) {
#ifdef FD_ISA_AVX2
  if (job.num_rows <= 2) return multiply_nibbles(job);
#endif
  quantized_tiles<Int4>(job);
}

// Tiles [first, end) of a job.
FD_INLINE TileJob part_of(const TileJob& job, int first, int end) {
  TileJob part = job;
  const int columns = (end - first) * kTileColumns, left = job.columns - first * kTileColumns;
  part.tile = job.tile + first * job.tile_bytes;
  part.columns = columns < left ? columns : left;
  part.scale = job.scale + first * kTileColumns;
  part.codes = job.codes + first;
  part.out = job.out + first * kTileColumns;
  return part;
}

void ccq_tiles(const TileJob& job) {
  const int tiles = (job.columns + kTileColumns - 1) / kTileColumns;
  for (int first = 0, end; first < tiles; first = end) {
    const int32_t is_integer = job.codes[first].is_integer;
    for (end = first + 1; end < tiles && job.codes[end].is_integer == is_integer;) ++end;
    const TileJob alike = part_of(job, first, end);
#ifdef FD_WORD_ROWS
    if (job.num_rows == 1) {
      is_integer ? multiply_words<Ccq<IntegerDecoder>>(alike)
                 : multiply_words<Ccq<ExactDecoder>>(alike);
      continue;
    }
#endif
    if (is_integer) {
      quantized_tiles<Ccq<IntegerDecoder>>(alike);
    } else {
      quantized_tiles<Ccq<ExactDecoder>>(alike);
    }
  }
}

void prove_codes(CcqCodes* codes) { codes->is_integer = integer_codes(*codes); }

// --- activations ---------------------------------------------------------------------------------

FD_INLINE float largest(const float* x) {
  F16 top = splat(0.0f);
  uint32_t nan = 0;
  for (int i = 0; i < kGroupRows; i += 16) {
    const F16 value = load(x + i);
    nan |= mask_nan(value);
    top = max(top, max(value, sub(splat(0.0f), value)));
  }
  return nan ? __builtin_nanf("") : reduce_max(top);
}

FD_INLINE float power_of_two(int exponent) {
  const uint32_t bits = (uint32_t)(exponent + 127) << 23;
  float power;
  memcpy(&power, &bits, sizeof(power));
  return power;
}

// The exponent of the largest power of two that keeps top * power at most `largest`; at most 100,
// so that all factors are normal numbers (a group below 2^-78 keeps an absolute error of 2^-101, or
// of 2^-93 in two digits).
FD_INLINE int exponent_for(float top, uint32_t largest) {
  uint32_t bits;
  memcpy(&bits, &top, sizeof(bits));
  const int exponent = (int)(bits >> 23) - 127;               // top = 1.f * 2^exponent
  const uint32_t significand = (bits & 0x7fffff) | 0x800000;  // top * 2^(22 - exponent) * 2
  const int fitted = (significand > 2 * largest ? 21 : 22) - exponent;
  return fitted < 100 ? fitted : 100;
}

// Integers are multiples of kUnit: 1, or 256 for two digits.
template <int kUnit>
FD_INLINE void split_group(const float* x, float power, int32_t offset, int8_t* digits,
                           int32_t* start) {
  int32_t sums[kDigits] = {0, 0, 0};
  for (int i = 0; i < kGroupRows; ++i) {
    const int32_t value = kUnit * (int32_t)__builtin_rintf(x[i] * (power / kUnit));
    const int32_t low = (int8_t)value;
    const int32_t rest = (value - low) >> 8;
    const int32_t middle = (int8_t)rest;
    const int32_t high = (rest - middle) >> 8;
    digits[i] = (int8_t)high;
    digits[kGroupRows + i] = (int8_t)middle;
    digits[2 * kGroupRows + i] = (int8_t)low;
    sums[0] += high;
    sums[1] += middle;
    sums[2] += low;
  }
  for (int d = 0; d < kDigits; ++d) start[d] = -offset * sums[d];
}

template <int kUnit>
FD_INLINE void quantize_groups(const float* x, int64_t depth, int32_t offset, int8_t* digits,
                               GroupNumbers* groups) {
  constexpr uint32_t kLargest = kUnit == 1 ? kMaxInteger : kMaxTwoDigits;
  for (int64_t g = 0; g < depth / kGroupRows; ++g) {
    GroupNumbers& numbers = groups[g];
    int8_t* bytes = digits + g * kGroupDigitBytes;
    const float top = largest(x + g * kGroupRows);
    if (top > 0.0f && top <= 0x1.fffffep127f) {
      const int exponent = exponent_for(top, kLargest);
      split_group<kUnit>(x + g * kGroupRows, power_of_two(exponent), offset, bytes, numbers.start);
      numbers.scale = power_of_two(-exponent);
      continue;
    }
    memset(bytes, 0, kGroupDigitBytes);
    numbers = {{0, 0, 0}, top == 0.0f ? 0.0f : __builtin_nanf("")};
  }
}

void quantize_row(const float* x, int64_t depth, int32_t offset, int digit_count, int8_t* digits,
                  GroupNumbers* groups) {
  digit_count == 2 ? quantize_groups<256>(x, depth, offset, digits, groups)
                   : quantize_groups<1>(x, depth, offset, digits, groups);
}

// --- dense weights -------------------------------------------------------------------------------

FD_INLINE F16 load_weights(const float* p) { return load(p); }
FD_INLINE F16 load_weights(const uint16_t* p) { return load_bf16(p); }

// The processor's own prefetching stops at every 4 KiB page: fetching a page ahead by hand read a
// row's weights 1.4 times as fast from memory.
constexpr int64_t kDenseFetchAhead = 4096;

// Sums over even and over odd k, then their sum: two chains of additions are enough to keep up with
// memory, and one register block serves more rows than with four.
template <typename Weight, int kRows>
FD_INLINE void dense_rows(const TileJob& job, int index, int first) {
  const Weight* tile = (const Weight*)(job.tile + index * job.tile_bytes);
  const float* x[kRows];
  F16 sums[kRows][2];
  for (int r = 0; r < kRows; ++r) {
    x[r] = job.x + (first + r) * job.x_stride;
    sums[r][0] = sums[r][1] = splat(0.0f);
  }
  for (int64_t k = 0; k < job.depth; k += 2) {
    const bool pair = k + 1 < job.depth;
    const uint8_t* here = (const uint8_t*)(tile + k * kTileColumns);
    for (size_t i = 0; i < 2 * sizeof(Weight) * kTileColumns; i += 64) {
      __builtin_prefetch(here + kDenseFetchAhead + i);
    }
    const F16 even = load_weights(tile + k * kTileColumns);
    for (int r = 0; r < kRows; ++r) sums[r][0] = fma(splat(x[r][k]), even, sums[r][0]);
    if (!pair) break;
    const F16 odd = load_weights(tile + (k + 1) * kTileColumns);
    for (int r = 0; r < kRows; ++r) sums[r][1] = fma(splat(x[r][k + 1]), odd, sums[r][1]);
  }
  for (int r = 0; r < kRows; ++r) store_columns(job, first + r, index, add(sums[r][0], sums[r][1]));
}

template <typename Weight, int kRows>
void dense_remainder(const TileJob& job, int index, int first) {
  if constexpr (kRows > 0) {
    if (job.num_rows - first >= kRows) return dense_rows<Weight, kRows>(job, index, first);
    dense_remainder<Weight, kRows - 1>(job, index, first);
  }
}

template <typename Weight>
void dense_tiles(const TileJob& job) {
  for (int index = 0; index * kTileColumns < job.columns; ++index) {
    int first = 0;
    for (; first + kDenseRowBlock <= job.num_rows; first += kDenseRowBlock) {
      dense_rows<Weight, kDenseRowBlock>(job, index, first);
    }
    dense_remainder<Weight, kDenseRowBlock - 1>(job, index, first);
  }
}

// --- the router ----------------------------------------------------------------------------------

FD_INLINE F16 load_some(const float* p, int count) {
  return count >= 16 ? load(p) : load_first(p, count, 0.0f);
}

void gate_logits(const float* x, const float* gate, int64_t depth, int64_t stride, int experts,
                 float* logits) {
  for (int first = 0; first < experts; first += 64) {
    F16 sums[4][2];
    for (auto& sum : sums) sum[0] = sum[1] = splat(0.0f);
    for (int64_t k = 0; k < depth; ++k) {
      for (int c = 0; c < 4 && first + 16 * c < experts; ++c) {
        const int column = first + 16 * c;
        const F16 w = load_some(gate + k * stride + column, experts - column);
        sums[c][k & 1] = fma(splat(x[k]), w, sums[c][k & 1]);
      }
    }
    for (int c = 0; c < 4 && first + 16 * c < experts; ++c) {
      const int column = first + 16 * c;
      store_first(logits + column, add(sums[c][0], sums[c][1]), experts - column);
    }
  }
}

void softmax(float* logits, int count) {
  const float lowest = -__builtin_inff();
  F16 top = splat(lowest);
  for (int i = 0; i < count; i += 16) top = max(load_first(logits + i, count - i, lowest), top);
  const F16 shift = splat(reduce_max(top));
  F16 sum = splat(0.0f);
  for (int i = 0; i < count; i += 16) {
    const F16 e = exp16(sub(load_first(logits + i, count - i, lowest), shift));
    sum = add(sum, e);
    store_first(logits + i, e, count - i);
  }
  const F16 total = splat(reduce_add(sum));
  for (int i = 0; i < count; i += 16) {
    store_first(logits + i, div(load_first(logits + i, count - i, 0.0f), total), count - i);
  }
}

void weighted_sum(const float* rows, int64_t stride, const int32_t* positions, const float* weights,
                  int count, int64_t width, float* out) {
  for (int64_t i = 0; i < width; i += 16) {
    const int left = width - i < 16 ? (int)(width - i) : 16;
    F16 sum = splat(0.0f);
    for (int s = 0; s < count; ++s) {
      const F16 value = load_some(rows + positions[s] * stride + i, left);
      sum = fma(splat(weights[s]), value, sum);
    }
    store_first(out + i, sum, left);
  }
}

}  // namespace

const LinearKernels linear_kernels = {
    quantize_row,          ccq_tiles,          prove_codes, int8_tiles, int4_tiles,
    dense_tiles<uint16_t>, dense_tiles<float>, gate_logits, softmax,    weighted_sum};

}  // namespace fd::FD_ISA

// Linear maps over packed weights: tiles of 16 columns times a block of rows.
#include "../linear_kernels.h"
#include "amx_rows.h"
#include "weight_formats.h"

namespace fd::FD_ISA {
namespace {

// --- one group of some rows ----------------------------------------------------------------------

// Adds group g of kRows rows to `total`. `quad(t, q)` gives the weights of rows 4q .. 4q + 3 of
// tile t, `factor(t, scale)` what the sum of a group is worth.
template <int kRows, int kTiles, typename QuadAt, typename Factor>
FD_INLINE void add_group(const Row* rows, int64_t g, const QuadAt& quad, const Factor& factor,
                         F16 (&total)[kRows][kTiles]) {
  I16 sums[kRows][kTiles][kDigits];
  for (int r = 0; r < kRows; ++r) {
    for (int d = 0; d < kDigits; ++d) {
      for (int t = 0; t < kTiles; ++t) sums[r][t][d] = splat_int(rows[r].groups[g].start[d]);
    }
  }
#pragma GCC unroll 16
  for (int q = 0; q < kGroupQuads; ++q) {
    decltype(quad(0, 0)) w[kTiles];
    for (int t = 0; t < kTiles; ++t) w[t] = quad(t, q);
    for (int r = 0; r < kRows; ++r) {
      const int8_t* digits = rows[r].digits + g * kGroupDigitBytes + 4 * q;
      for (int d = 0; d < kDigits; ++d) {
        for (int t = 0; t < kTiles; ++t) {
          sums[r][t][d] = dot(sums[r][t][d], w[t], digits + d * kGroupRows);
        }
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    const F16 scale = splat(rows[r].groups[g].scale);
    for (int t = 0; t < kTiles; ++t) {
      total[r][t] = fma(join(sums[r][t]), factor(t, scale), total[r][t]);
    }
  }
}

template <typename Format, int kTiles>
struct Formats {
  Format tile[kTiles];
};
template <typename Format>
FD_INLINE Formats<Format, 1> formats_of(const TileJob& job, int first, Formats<Format, 1>*) {
  return {{Format(job, first)}};
}
template <typename Format>
FD_INLINE Formats<Format, 2> formats_of(const TileJob& job, int first, Formats<Format, 2>*) {
  return {{Format(job, first), Format(job, first + 1)}};
}

// Fetches one group's worth of tile `tile` kFetchAhead bytes beyond `at`; past the tile's end that
// is the tile which this place of the block takes next.
template <typename Format, int kTiles>
FD_INLINE void fetch_ahead(const TileJob& job, const uint8_t* tile, const uint8_t* at) {
  const uint8_t* ahead = at + kFetchAhead;
  if (ahead >= tile + job.tile_bytes) ahead += (kTiles - 1) * job.tile_bytes;
  for (int i = 0; i < Format::kGroupBytes; i += 64) __builtin_prefetch(ahead + i);
}

// Few rows: the weights go from memory through the decoder straight into the dot products.
template <typename Format, int kRows, int kTiles>
void stream_rows(const TileJob& job, int first_tile) {
  const auto formats = formats_of(job, first_tile, (Formats<Format, kTiles>*)nullptr);
  Row rows[kRows];
  F16 total[kRows][kTiles];
  for (int r = 0; r < kRows; ++r) {
    rows[r] = row_of(job, r);
    for (int t = 0; t < kTiles; ++t) total[r][t] = splat(0.0f);
  }
  const int64_t groups = job.depth / kGroupRows;
  for (int64_t g = 0; g < groups; ++g) {
    const uint8_t* weights[kTiles];
    for (int t = 0; t < kTiles; ++t) {
      weights[t] = formats.tile[t].group(g);
      fetch_ahead<Format, kTiles>(job, formats.tile[t].tile, weights[t]);
    }
    add_group<kRows, kTiles>(
        rows, g, [&](int t, int q) { return formats.tile[t].quad(weights[t], q); },
        [&](int t, F16 scale) { return Format::factor(formats.tile[t].local(g), scale); }, total);
  }
  for (int r = 0; r < kRows; ++r) {
    for (int t = 0; t < kTiles; ++t) store_total(job, r, first_tile + t, groups, total[r][t]);
  }
}

#ifndef FD_ISA_AMX

constexpr int kTileBytesDecoded = kGroupQuads * 64;

// Rows [first, first + kRows) of group g, whose decoded quads lie in `decoded`. Not inlined: inside
// the loop over rows the compiler takes all 32 vectors of weights for loop invariants, which it
// then spills (half the speed).
template <typename Format, int kRows, int kTiles>
__attribute__((noinline)) void add_decoded(const TileJob& job,
                                           const Formats<Format, kTiles>& formats, int64_t g,
                                           int first, const uint8_t* decoded, float* totals) {
  Row rows[kRows];
  F16 total[kRows][kTiles];
  float* kept = totals + first * kTiles * kTileColumns;
  for (int r = 0; r < kRows; ++r) {
    rows[r] = row_of(job, first + r);
    for (int t = 0; t < kTiles; ++t) total[r][t] = load(kept + (r * kTiles + t) * kTileColumns);
  }
  add_group<kRows, kTiles>(
      rows, g,
      [&](int t, int q) { return Format::load_stored(decoded + t * kTileBytesDecoded + q * 64); },
      [&](int t, F16 scale) { return Format::factor(formats.tile[t].local(g), scale); }, total);
  for (int r = 0; r < kRows; ++r) {
    for (int t = 0; t < kTiles; ++t) store(kept + (r * kTiles + t) * kTileColumns, total[r][t]);
  }
}

// Rows that share a decoded group. More do not pay: decoding takes a twentieth of the time for 64,
// and with 256 the totals leave no room in the L1 cache (60 instead of 80 G multiply-adds/s,
// AVX-512).
constexpr int kVectorRows = 64;

// Many rows: a group is decoded once into the L1 cache and used for all rows. Groups [begin, end).
template <typename Format, int kTiles>
void decode_then_rows(const TileJob& job, int first_tile, int64_t begin, int64_t end) {
  alignas(64) uint8_t decoded[kTiles * kTileBytesDecoded];
  alignas(64) float totals[kVectorRows * kTiles * kTileColumns];
  for (int i = 0; i < job.num_rows; ++i) {
    for (int t = 0; t < kTiles; ++t) {
      const F16 total = begin == 0 ? splat(0.0f) : load_total(job, i, first_tile + t);
      store(totals + (i * kTiles + t) * kTileColumns, total);
    }
  }
  const auto formats = formats_of(job, first_tile, (Formats<Format, kTiles>*)nullptr);
  const int whole = job.num_rows - job.num_rows % kRowBlock;
  for (int64_t g = begin; g < end; ++g) {
    for (int t = 0; t < kTiles; ++t) {
      const uint8_t* weights = formats.tile[t].group(g);
      uint8_t* to = decoded + t * kTileBytesDecoded;
      for (int q = 0; q < kGroupQuads; ++q) store(to + q * 64, formats.tile[t].quad(weights, q));
    }
    for (int i = 0; i < whole; i += kRowBlock) {
      add_decoded<Format, kRowBlock, kTiles>(job, formats, g, i, decoded, totals);
    }
    for (int i = whole; i < job.num_rows; ++i) {
      add_decoded<Format, 1, kTiles>(job, formats, g, i, decoded, totals);
    }
  }
  for (int i = 0; i < job.num_rows; ++i) {
    for (int t = 0; t < kTiles; ++t) {
      store_total(job, i, first_tile + t, end, load(totals + (i * kTiles + t) * kTileColumns));
    }
  }
}

#endif  // FD_ISA_AMX

template <typename Format, int kTiles>
FD_INLINE void stream(const TileJob& job, int first_tile) {
  if (job.num_rows == 1) return stream_rows<Format, 1, kTiles>(job, first_tile);
  if constexpr (kRowBlock == 4) {
    if (job.num_rows == 2) return stream_rows<Format, 2, kTiles>(job, first_tile);
    if (job.num_rows == 3) return stream_rows<Format, 3, kTiles>(job, first_tile);
    if (job.num_rows == 4) return stream_rows<Format, 4, kTiles>(job, first_tile);
  }
}

template <typename Format>
void stream_tiles(const TileJob& job) {
  const int tiles = (job.columns + kTileColumns - 1) / kTileColumns;
  int tile = 0;
  for (; tile + kTileBlock <= tiles; tile += kTileBlock) stream<Format, kTileBlock>(job, tile);
  for (; tile < tiles; ++tile) stream<Format, 1>(job, tile);
}

#ifndef FD_ISA_AMX
// Groups [begin, end) of all tiles.
template <typename Format>
void multiply_groups(const TileJob& job, int64_t begin, int64_t end) {
  const int tiles = (job.columns + kTileColumns - 1) / kTileColumns;
  int tile = 0;
  for (; tile + kTileBlock <= tiles; tile += kTileBlock) {
    decode_then_rows<Format, kTileBlock>(job, tile, begin, end);
  }
  for (; tile < tiles; ++tile) decode_then_rows<Format, 1>(job, tile, begin, end);
}

// As many groups as keep the digits of a block of rows in half of a small L2 cache while the tiles
// pass by: reading them from further away for every tile cost half of the speed at K = 8192. Totals
// wait in the results between two stretches, which is little traffic beside the digits' own.
FD_INLINE int64_t stretch_groups(int rows) {
  constexpr int64_t kDigitCacheBytes = 1 << 20;
  return kDigitCacheBytes / ((int64_t)rows * kGroupDigitBytes);
}

template <typename Format>
void multiply_by_vectors(const TileJob& job) {
  const int64_t groups = job.depth / kGroupRows;
  for (int first = 0; first < job.num_rows; first += kVectorRows) {
    const Row row = row_of(job, first);
    TileJob block = job;
    block.digits = row.digits;
    block.groups = row.groups;
    block.num_rows = job.num_rows - first < kVectorRows ? job.num_rows - first : kVectorRows;
    block.out = job.out + first * job.out_stride;
    const int64_t step = stretch_groups(block.num_rows);
    for (int64_t begin = 0; begin < groups; begin += step) {
      multiply_groups<Format>(block, begin, begin + step < groups ? begin + step : groups);
    }
  }
}
#endif

template <typename Format>
void quantized_tiles(const TileJob& job) {
  if (job.num_rows <= kRowBlock) return stream_tiles<Format>(job);
#ifdef FD_ISA_AMX
  multiply_by_tiles<Format>(job);
#else
  multiply_by_vectors<Format>(job);
#endif
}

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

// The exponent of the largest power of two that keeps top * power at most kMaxInteger; at most 100,
// so that all factors are normal numbers (a group below 2^-78 keeps an absolute error of 2^-101).
FD_INLINE int exponent_for(float top) {
  uint32_t bits;
  memcpy(&bits, &top, sizeof(bits));
  const int exponent = (int)(bits >> 23) - 127;               // top = 1.f * 2^exponent
  const uint32_t significand = (bits & 0x7fffff) | 0x800000;  // top * 2^(22 - exponent) * 2
  const int fitted = (significand > 2u * kMaxInteger ? 21 : 22) - exponent;
  return fitted < 100 ? fitted : 100;
}

FD_INLINE void split_group(const float* x, float power, int32_t offset, int8_t* digits,
                           int32_t* start) {
  int32_t sums[kDigits] = {0, 0, 0};
  for (int i = 0; i < kGroupRows; ++i) {
    const int32_t value = (int32_t)__builtin_rintf(x[i] * power);
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

void quantize_row(const float* x, int64_t depth, int32_t offset, int8_t* digits,
                  GroupNumbers* groups) {
  for (int64_t g = 0; g < depth / kGroupRows; ++g) {
    GroupNumbers& numbers = groups[g];
    int8_t* bytes = digits + g * kGroupDigitBytes;
    const float top = largest(x + g * kGroupRows);
    if (top > 0.0f && top <= 0x1.fffffep127f) {
      const int exponent = exponent_for(top);
      split_group(x + g * kGroupRows, power_of_two(exponent), offset, bytes, numbers.start);
      numbers.scale = power_of_two(-exponent);
      continue;
    }
    memset(bytes, 0, kGroupDigitBytes);
    numbers = {{0, 0, 0}, top == 0.0f ? 0.0f : __builtin_nanf("")};
  }
}

// --- dense weights -------------------------------------------------------------------------------

FD_INLINE F16 load_weights(const float* p) { return load(p); }
FD_INLINE F16 load_weights(const uint16_t* p) { return load_bf16(p); }

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
    quantize_row,          quantized_tiles<Ccq>, quantized_tiles<Int8>, quantized_tiles<Int4>,
    dense_tiles<uint16_t>, dense_tiles<float>,   gate_logits,           softmax,
    weighted_sum};

}  // namespace fd::FD_ISA

// Quantised tiles times rows by dot products of four bytes in vector registers.
#pragma once

#include "weight_formats.h"

#if !defined(FD_ISA_AVX2)

namespace fd::FD_ISA {

// --- one group of some rows ----------------------------------------------------------------------

// Adds group g of kRows rows to `total`. `quad(t, q)` gives the weights of rows 4q .. 4q + 3 of
// tile t, `factor(t, scale)` what the sum of a group is worth.
template <int kDigitCount, int kRows, int kTiles, typename QuadAt, typename Factor>
FD_INLINE void add_group(const Row* rows, int64_t g, const QuadAt& quad, const Factor& factor,
                         F16 (&total)[kRows][kTiles]) {
  I16 sums[kRows][kTiles][kDigitCount];
  for (int r = 0; r < kRows; ++r) {
    for (int d = 0; d < kDigitCount; ++d) {
      for (int t = 0; t < kTiles; ++t) sums[r][t][d] = splat_int(rows[r].groups[g].start[d]);
    }
  }
#pragma GCC unroll 16
  for (int q = 0; q < kGroupQuads; ++q) {
    Quads w[kTiles];
    for (int t = 0; t < kTiles; ++t) w[t] = quad(t, q);
    for (int r = 0; r < kRows; ++r) {
      const int8_t* digits = rows[r].digits + g * kGroupDigitBytes + 4 * q;
      for (int d = 0; d < kDigitCount; ++d) {
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

// Few rows: the weights go from memory through the decoder straight into the dot products.
template <typename Format, int kDigitCount, int kRows, int kTiles>
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
    add_group<kDigitCount, kRows, kTiles>(
        rows, g, [&](int t, int q) { return formats.tile[t].quad(weights[t], q); },
        [&](int t, F16 scale) { return Format::factor(formats.tile[t].local(g), scale); }, total);
  }
  for (int r = 0; r < kRows; ++r) {
    for (int t = 0; t < kTiles; ++t) store_total(job, r, first_tile + t, groups, total[r][t]);
  }
}

constexpr int kTileBytesDecoded = kGroupQuads * 64;

// Rows [first, first + kRows) of group g, whose decoded quads of tile t lie in `decoded[t]`. Not
// inlined: inside the loop over rows the compiler takes all 32 vectors of weights for loop
// invariants, which it then spills (half the speed).
template <typename Format, int kDigitCount, int kRows, int kTiles>
__attribute__((noinline)) void add_decoded(const TileJob& job,
                                           const Formats<Format, kTiles>& formats, int64_t g,
                                           int first, const uint8_t* const (&decoded)[kTiles],
                                           float* totals) {
  Row rows[kRows];
  F16 total[kRows][kTiles];
  float* kept = totals + first * kTiles * kTileColumns;
  for (int r = 0; r < kRows; ++r) {
    rows[r] = row_of(job, first + r);
    for (int t = 0; t < kTiles; ++t) total[r][t] = load(kept + (r * kTiles + t) * kTileColumns);
  }
  add_group<kDigitCount, kRows, kTiles>(
      rows, g, [&](int t, int q) { return Format::load_stored(decoded[t] + q * 64); },
      [&](int t, F16 scale) { return Format::factor(formats.tile[t].local(g), scale); }, total);
  for (int r = 0; r < kRows; ++r) {
    for (int t = 0; t < kTiles; ++t) store(kept + (r * kTiles + t) * kTileColumns, total[r][t]);
  }
}

// Rows that share a decoded group. More do not pay: decoding takes a twentieth of the time for 64,
// and with 256 the totals leave no room in the L1 cache (60 instead of 80 G multiply-adds/s,
// AVX-512).
constexpr int kVectorRows = 64;

// Group g as add_decoded takes it: decoded into `memory`, or where it lies if that is the same.
template <typename Format>
FD_INLINE const uint8_t* decode_group(const Format& format, int64_t g, uint8_t* memory) {
  const uint8_t* weights = format.group(g);
  if constexpr (Format::kNeedsDecoding) {
    // With q known, what the decoder makes of it costs nothing: a fifth of the time for 8 rows.
#pragma GCC unroll 16
    for (int q = 0; q < kGroupQuads; ++q) store(memory + q * 64, format.quad(weights, q));
    return memory;
  }
  return weights;
}

// Many rows: a group is decoded once into the L1 cache and used for all rows. Groups [begin, end).
template <typename Format, int kDigitCount, int kTiles>
void decode_then_rows(const TileJob& job, int first_tile, int64_t begin, int64_t end) {
  alignas(64) uint8_t memory[kTiles][kTileBytesDecoded];
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
    const uint8_t* decoded[kTiles];
    for (int t = 0; t < kTiles; ++t) {
      const Format& format = formats.tile[t];
      fetch_ahead<Format, kTiles, 2>(job, format.tile, format.group(g));
      decoded[t] = decode_group(format, g, memory[t]);
    }
    for (int i = 0; i < whole; i += kRowBlock) {
      add_decoded<Format, kDigitCount, kRowBlock, kTiles>(job, formats, g, i, decoded, totals);
    }
    for (int i = whole; i < job.num_rows; ++i) {
      add_decoded<Format, kDigitCount, 1, kTiles>(job, formats, g, i, decoded, totals);
    }
  }
  for (int i = 0; i < job.num_rows; ++i) {
    for (int t = 0; t < kTiles; ++t) {
      store_total(job, i, first_tile + t, end, load(totals + (i * kTiles + t) * kTileColumns));
    }
  }
}

template <typename Format, int kDigitCount, int kTiles>
FD_INLINE void stream(const TileJob& job, int first_tile) {
  if (job.num_rows == 1) return stream_rows<Format, kDigitCount, 1, kTiles>(job, first_tile);
  if constexpr (kRowBlock >= 2) {
    if (job.num_rows == 2) return stream_rows<Format, kDigitCount, 2, kTiles>(job, first_tile);
  }
  if constexpr (kRowBlock == 4) {
    if (job.num_rows == 3) return stream_rows<Format, kDigitCount, 3, kTiles>(job, first_tile);
    if (job.num_rows == 4) return stream_rows<Format, kDigitCount, 4, kTiles>(job, first_tile);
  }
}

template <typename Format, int kDigitCount>
void stream_tiles(const TileJob& job) {
  const int tiles = (job.columns + kTileColumns - 1) / kTileColumns;
  int tile = 0;
  for (; tile + kTileBlock <= tiles; tile += kTileBlock)
    stream<Format, kDigitCount, kTileBlock>(job, tile);
  for (; tile < tiles; ++tile) stream<Format, kDigitCount, 1>(job, tile);
}

// Groups [begin, end) of all tiles.
template <typename Format, int kDigitCount>
void multiply_groups(const TileJob& job, int64_t begin, int64_t end) {
  const int tiles = (job.columns + kTileColumns - 1) / kTileColumns;
  int tile = 0;
  for (; tile + kTileBlock <= tiles; tile += kTileBlock) {
    decode_then_rows<Format, kDigitCount, kTileBlock>(job, tile, begin, end);
  }
  for (; tile < tiles; ++tile) decode_then_rows<Format, kDigitCount, 1>(job, tile, begin, end);
}

// As many groups as keep the digits of a block of rows in half of a small L2 cache while the tiles
// pass by: reading them from further away for every tile cost half of the speed at K = 8192. Totals
// wait in the results between two stretches, which is little traffic beside the digits' own.
FD_INLINE int64_t stretch_groups(int rows) {
  constexpr int64_t kDigitCacheBytes = 1 << 20;
  return kDigitCacheBytes / ((int64_t)rows * kGroupDigitBytes);
}

template <typename Format, int kDigitCount>
void multiply_by_vectors(const TileJob& job) {
  const int64_t groups = job.depth / kGroupRows;
  for (int first = 0; first < job.num_rows; first += kVectorRows) {
    const int left = job.num_rows - first;
    const TileJob block = rows_of(job, first, left < kVectorRows ? left : kVectorRows);
    const int64_t step = stretch_groups(block.num_rows);
    for (int64_t begin = 0; begin < groups; begin += step) {
      multiply_groups<Format, kDigitCount>(block, begin,
                                           begin + step < groups ? begin + step : groups);
    }
  }
}

}  // namespace fd::FD_ISA

#endif

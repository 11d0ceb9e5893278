// Many rows through the tile unit (AMX): one instruction multiplies one digit of a group of 64 for
// 16 rows and 16 columns.
//
// The weights go in as signed bytes, their offset taken off while they are decoded, so that the
// sums begin at zero; they are the same integers as with an offset undone at the start. A group's
// sums are then joined and scaled as everywhere else.
//
// The tile unit needs 48 cycles for a group of a 16 x 16 tile, its stores another 48 and joining
// the sums 56 or more of the vector unit, so all three must run side by side. What decides is where
// things lie and in which order they are asked for (cycles a group and tile, measured): digits read
// from the L2 cache and sums joined after the products 195; digits of a block in the L1 cache, one
// product's instructions strewn among the joining of an earlier one's sums, 121.
#pragma once

#ifdef FD_ISA_AMX

#include "amx.h"
#include "weight_formats.h"

namespace fd::FD_ISA {

// --- what a stretch of K is worked on with -------------------------------------------------------

// Groups whose digits, of 16 rows, stay in the L1 cache while a panel's tiles pass by.
constexpr int kStretchGroups = 8;
// Tiles of weights decoded at once. Panel and totals stay in the L2 cache; the digits of all rows
// are read from further away once for a panel.
constexpr int kPanelTiles = 16;

// The weights [tiles][groups] of a stretch, and the totals of the panel over all of K.
struct alignas(64) Panel {
  uint8_t weights[kPanelTiles * kStretchGroups * kWeightTileBytes];
  float local[kPanelTiles * kStretchGroups][kTileColumns];
  float totals[kPanelTiles][kMaxRows][kTileColumns];
};

// Up to 16 rows of a stretch. `groups` is even: a last odd one is followed by an empty one, whose
// digits and scales are 0 and which so leaves the totals as they are.
struct alignas(64) RowTile {
  int8_t digits[kStretchGroups][kDigits][kTileRows16][kGroupRows];
  float scales[kStretchGroups][kTileRows16];
  int groups;

  template <int kDigitCount>
  void fill(const TileJob& job, int first_row, int rows, int64_t begin, int count) {
    groups = count + count % 2;
    for (int r = 0; r < rows; ++r) {
      const Row row = row_of(job, first_row + r);
      const int8_t* from = row.digits + begin * kGroupDigitBytes;
      for (int g = 0; g < count; ++g, from += kGroupDigitBytes) {
        for (int d = 0; d < kDigitCount; ++d) {
          memcpy(digits[g][d][r], from + d * kGroupRows, kGroupRows);
        }
        scales[g][r] = row.groups[begin + g].scale;
      }
    }
    if (groups == count) return;
    memset(digits[count], 0, sizeof(digits[count]));
    memset(scales[count], 0, sizeof(scales[count]));
  }
};

template <typename Format>
void decode_stretch(const Format& format, int64_t begin, int count, int groups, uint8_t* weights,
                    float (*local)[kTileColumns]) {
  const __m512i offset = _mm512_set1_epi8((char)Format::kOffset);
  for (int g = 0; g < count; ++g) {
    const uint8_t* stored = format.group(begin + g);
    const uint8_t* ahead = stored + kStretchGroups * Format::kGroupBytes;  // the next stretch
    for (int i = 0; i < Format::kGroupBytes; i += 64) __builtin_prefetch(ahead + i, 0, 2);
#pragma GCC unroll 16
    for (int q = 0; q < kGroupQuads; ++q) {
      const __m512i signed_quad = _mm512_sub_epi8(format.quad(stored, q).v, offset);
      _mm512_store_si512(weights + g * kWeightTileBytes + q * 64, signed_quad);
    }
    store(local[g], format.local(begin + g));
  }
  for (int g = count; g < groups; ++g) store(local[g], splat(0.0f));
}

// --- one group of one tile -----------------------------------------------------------------------

struct alignas(64) TileSums {
  int32_t of[kDigits][kTileRows16][kTileColumns];
};

template <int kRows>
struct Totals {
  F16 row[kRows];
};

// What the vector unit does in a step: `sums` times their scales join the totals.
struct Joining {
  const TileSums* sums;
  const float* scales;
  F16 local;
};

// Part kPart of the rows, of two for each digit.
template <typename Format, int kDigitCount, int kPart, int kRows>
FD_INLINE void join_part(const Joining& job, Totals<kRows>& totals) {
  constexpr int kParts = 2 * kDigitCount;
#pragma GCC unroll 16
  for (int r = kRows * kPart / kParts; r < kRows * (kPart + 1) / kParts; ++r) {
    I16 digits[kDigitCount];
    for (int d = 0; d < kDigitCount; ++d) digits[d] = load_ints(job.sums->of[d][r]);
    const F16 factor = Format::factor(job.local, splat(job.scales[r]));
    totals.row[r] = fma(join(digits), factor, totals.row[r]);
  }
}

// Three stages of a pipeline: products of one group into the registers from kNew on, the sums of
// the group before out of those from kOld on to `sums`, and the sums before those joined. Digit
// kDigit and those behind it.
template <typename Format, int kNew, int kOld, int kDigitCount, int kRows, int kDigit = 0>
FD_INLINE void step(const uint8_t* weights, const int8_t* digits, TileSums& sums,
                    const Joining& joining, Totals<kRows>& totals) {
  if constexpr (kDigit == 0) tile_load<kWeightTile>(weights, 64);
  tile_zero<kNew + kDigit>();
  tile_load<kDigitTile>(digits + kDigit * kTileRows16 * kGroupRows, kGroupRows);
  tile_dot<kNew + kDigit>();
  join_part<Format, kDigitCount, 2 * kDigit>(joining, totals);
  tile_store<kOld + kDigit>(sums.of[kDigit], 64);
  join_part<Format, kDigitCount, 2 * kDigit + 1>(joining, totals);
  if constexpr (kDigit + 1 < kDigitCount) {
    step<Format, kNew, kOld, kDigitCount, kRows, kDigit + 1>(weights, digits, sums, joining,
                                                             totals);
  }
}

// A stretch of kRows rows from `first_row` on, for `tiles` tiles of the panel. The products run two
// groups ahead of the joining, on into the next tile; the last two read what lies behind the
// weights and are dropped.
template <typename Format, int kDigitCount, int kRows>
void multiply_stretch(const RowTile& rows, int first_row, int tiles, Panel& panel) {
  TileSums even, odd;
  Totals<kRows> none;
  for (int r = 0; r < kRows; ++r) none.row[r] = splat(0.0f);
  const Joining nothing = {&even, rows.scales[0], splat(0.0f)};
  const uint8_t* weights = panel.weights;
  int group = 0;
  const auto next_digits = [&] {
    const int8_t* digits = rows.digits[group][0][0];
    group = group + 1 < rows.groups ? group + 1 : 0;
    return digits;
  };
  memset(&even, 0, sizeof(even));
  step<Format, kEvenSums, kOddSums, kDigitCount, kRows>(weights, next_digits(), odd, nothing, none);
  weights += kWeightTileBytes;
  step<Format, kOddSums, kEvenSums, kDigitCount, kRows>(weights, next_digits(), even, nothing,
                                                        none);
  weights += kWeightTileBytes;
  const float (*local)[kTileColumns] = panel.local;
  for (int t = 0; t < tiles; ++t) {
    Totals<kRows> totals;
    float (*kept)[kTileColumns] = panel.totals[t] + first_row;
    for (int r = 0; r < kRows; ++r) totals.row[r] = load(kept[r]);
    for (int g = 0; g < rows.groups; g += 2, local += 2, weights += 2 * kWeightTileBytes) {
      const Joining first = {&even, rows.scales[g], load(local[0])};
      step<Format, kEvenSums, kOddSums, kDigitCount, kRows>(weights, next_digits(), odd, first,
                                                            totals);
      const Joining second = {&odd, rows.scales[g + 1], load(local[1])};
      step<Format, kOddSums, kEvenSums, kDigitCount, kRows>(weights + kWeightTileBytes,
                                                            next_digits(), even, second, totals);
    }
    for (int r = 0; r < kRows; ++r) store(kept[r], totals.row[r]);
  }
}

// --- a job ---------------------------------------------------------------------------------------

// Groups [begin, begin + count) of the tiles [first, first + tiles).
template <typename Format, int kDigitCount>
void add_stretch(const TileJob& job, int first, int tiles, int64_t begin, int count, Panel& panel) {
  const int groups = count + count % 2;
  for (int t = 0; t < tiles; ++t) {
    decode_stretch(Format(job, first + t), begin, count, groups,
                   panel.weights + t * groups * kWeightTileBytes, panel.local + t * groups);
  }
  RowTile tile;
  for (int row = 0; row < job.num_rows; row += kTileRows16) {
    const int rows = job.num_rows - row < kTileRows16 ? job.num_rows - row : kTileRows16;
    tile.fill<kDigitCount>(job, row, rows, begin, count);
    if (rows <= 4) {
      multiply_stretch<Format, kDigitCount, 4>(tile, row, tiles, panel);
    } else if (rows <= 8) {
      multiply_stretch<Format, kDigitCount, 8>(tile, row, tiles, panel);
    } else if (rows <= 12) {
      multiply_stretch<Format, kDigitCount, 12>(tile, row, tiles, panel);
    } else {
      multiply_stretch<Format, kDigitCount, 16>(tile, row, tiles, panel);
    }
  }
}

FD_INLINE Panel& thread_panel() {
  static thread_local Panel panel;
  return panel;
}

// All rows of a job, more than are worth streaming. A few rows go through vector registers also
// where there are tiles: their weights decoded into a tile and their three digits as its rows
// reached 0.8 of that speed.
template <typename Format, int kDigitCount>
void multiply_by_tiles(const TileJob& job) {
  Panel& panel = thread_panel();
  const TileShape shape;
  const int64_t groups = job.depth / kGroupRows;
  const int all = (job.columns + kTileColumns - 1) / kTileColumns;
  for (int first = 0; first < all; first += kPanelTiles) {
    const int tiles = all - first < kPanelTiles ? all - first : kPanelTiles;
    for (int t = 0; t < tiles; ++t) memset(panel.totals[t], 0, (size_t)job.num_rows * 64);
    for (int64_t begin = 0; begin < groups; begin += kStretchGroups) {
      const int64_t left = groups - begin;
      const int count = (int)(left < kStretchGroups ? left : kStretchGroups);
      add_stretch<Format, kDigitCount>(job, first, tiles, begin, count, panel);
    }
    for (int r = 0; r < job.num_rows; ++r) {
      for (int t = 0; t < tiles; ++t) {
        store_total(job, r, first + t, groups, load(panel.totals[t][r]));
      }
    }
  }
}

}  // namespace fd::FD_ISA

#endif  // FD_ISA_AMX

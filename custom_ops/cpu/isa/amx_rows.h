// Many rows through the tile unit (AMX): one instruction multiplies one digit of a group of 64 for
// 16 rows and 16 columns.
//
// The weights go in as signed bytes, their offset taken off while they are decoded, so that the
// sums begin at zero; they are the same integers as with an offset undone at the start. A group's
// sums are then joined and scaled as everywhere else.
#pragma once

#ifdef FD_ISA_AMX

#include "weight_formats.h"

namespace fd::FD_ISA {

// Below, the vector unit's stream is faster: a tile instruction costs as much for one row as the
// set-up of a block does.
constexpr int kMinTileRows = 5;
constexpr int kMaxTileRows = 16;

// --- the instructions ----------------------------------------------------------------------------
//
// Written out instead of taken from <immintrin.h>: those name registers by token, which a template
// cannot, and GCC 12 drops stores of a configuration that only its tile intrinsics read. Here each
// is ordered with all memory.

// Registers: weights, activations, and two sets of sums (one digit each) which alternate.
constexpr int kWeightTile = 0;
constexpr int kDigitTile = 1;
constexpr int kEvenSums = 2;
constexpr int kOddSums = kEvenSums + kDigits;

template <int kTile>
FD_INLINE void tile_zero() {
  __asm__ volatile("tilezero %%tmm%c0" ::"n"(kTile) : "memory");
}
template <int kTile>
FD_INLINE void tile_load(const void* p, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "n"(kTile) : "memory");
}
template <int kTile>
FD_INLINE void tile_store(void* p, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "n"(kTile) : "memory");
}
// sums += digits * weights, both signed bytes
template <int kSums>
FD_INLINE void tile_dot() {
  __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"n"(kSums), "n"(kDigitTile),
                   "n"(kWeightTile)
                   : "memory");
}

// Shapes the registers for blocks of `rows` rows, and gives them back at the end: other code then
// runs, and other threads are switched to, without the burden of their state.
class TileShape {
 public:
  explicit TileShape(int rows) {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < kOddSums + kDigits; ++i) {
      config.row_bytes[i] = 64;
      config.rows[i] = (uint8_t)(i == kWeightTile ? kGroupQuads : rows);
    }
    __asm__ volatile("ldtilecfg (%0)" ::"r"(&config) : "memory");
  }
  TileShape(const TileShape&) = delete;
  TileShape& operator=(const TileShape&) = delete;
  ~TileShape() { __asm__ volatile("tilerelease" ::: "memory"); }
};

// --- one group -----------------------------------------------------------------------------------

struct alignas(64) TileSums {
  int32_t of[kDigits][kMaxTileRows][kTileColumns];
};

template <int kFirst>
FD_INLINE void multiply_digits(const int8_t* digits, int64_t stride, TileSums& sums) {
  tile_zero<kFirst>();
  tile_load<kDigitTile>(digits, stride);
  tile_dot<kFirst>();
  tile_zero<kFirst + 1>();
  tile_load<kDigitTile>(digits + kGroupRows, stride);
  tile_dot<kFirst + 1>();
  tile_zero<kFirst + 2>();
  tile_load<kDigitTile>(digits + 2 * kGroupRows, stride);
  tile_dot<kFirst + 2>();
  tile_store<kFirst>(sums.of[0], 64);
  tile_store<kFirst + 1>(sums.of[1], 64);
  tile_store<kFirst + 2>(sums.of[2], 64);
}

// Rows [first, last) of a block: their sums join `totals` [rows][16].
template <typename Format>
FD_INLINE void join_rows(const TileSums& sums, const float* scales, F16 local, int first, int last,
                         float* totals) {
#pragma GCC unroll 4
  for (int r = first; r < last; ++r) {
    const I16 digits[kDigits] = {load_ints(sums.of[0][r]), load_ints(sums.of[1][r]),
                                 load_ints(sums.of[2][r])};
    float* total = totals + r * kTileColumns;
    store(total, fma(join(digits), Format::factor(local, splat(scales[r])), load(total)));
  }
}

// The rows of a job in blocks of equal height. The last block ends with the last row and so may
// begin among the rows of the block before it, whose sums it computes once more and drops.
struct RowBlocks {
  int rows, count, height;

  explicit RowBlocks(int num_rows)
      : rows(num_rows),
        count((num_rows + kMaxTileRows - 1) / kMaxTileRows),
        height((num_rows + count - 1) / count) {}
  int begin(int block) const { return block + 1 < count ? block * height : rows - height; }
  int skipped(int block) const { return block * height - begin(block); }
};

template <typename Format>
void decode_signed(const Format& format, int64_t g, uint8_t* decoded) {
  const uint8_t* weights = format.group(g);
  for (int q = 0; q < kGroupQuads; ++q) {
    const __m512i stored = format.quad(weights, q).v;
    _mm512_store_si512(decoded + q * 64,
                       _mm512_sub_epi8(stored, _mm512_set1_epi8(Format::kOffset)));
  }
}

// One group of one column tile for all rows. While the tile unit works on a block, the vector unit
// joins the sums of the one before.
template <typename Format>
FD_INLINE void add_group_of_tile(const TileJob& job, const RowBlocks& blocks, const Format& format,
                                 int64_t g, const float* scales, float* totals) {
  alignas(64) uint8_t decoded[kGroupQuads * 64];
  TileSums even, odd;
  decode_signed(format, g, decoded);
  tile_load<kWeightTile>(decoded, 64);
  const F16 local = format.local(g);
  const int8_t* digits = job.digits + g * kGroupDigitBytes;
  const auto join_block = [&](int block, const TileSums& sums) {
    const int begin = blocks.begin(block);
    join_rows<Format>(sums, scales + begin, local, blocks.skipped(block), blocks.height,
                      totals + begin * kTileColumns);
  };
  for (int block = 0; block < blocks.count; block += 2) {
    multiply_digits<kEvenSums>(digits + blocks.begin(block) * job.digit_stride, job.digit_stride,
                               even);
    if (block > 0) join_block(block - 1, odd);
    if (block + 1 < blocks.count) {
      multiply_digits<kOddSums>(digits + blocks.begin(block + 1) * job.digit_stride,
                                job.digit_stride, odd);
    }
    join_block(block, even);
  }
  if (blocks.count % 2 == 0) join_block(blocks.count - 1, odd);
}

// Scales of groups [begin, end), so that the rows of a group follow one another.
struct RowScales {
  float of[kMaxDepthGroups][kMaxRows];

  RowScales(const TileJob& job, int64_t begin, int64_t end) {
    const int64_t groups = job.depth / kGroupRows;
    for (int64_t r = 0; r < job.num_rows; ++r) {
      for (int64_t g = begin; g < end; ++g) of[g - begin][r] = job.groups[r * groups + g].scale;
    }
  }
};

// Groups [begin, end) of all tiles of the job.
template <typename Format>
void multiply_by_tiles(const TileJob& job, int64_t begin, int64_t end) {
  const RowBlocks blocks(job.num_rows);
  const TileShape shape(blocks.height);
  const RowScales scales(job, begin, end);
  alignas(64) float totals[kMaxRows * kTileColumns];
  for (int tile = 0; tile * kTileColumns < job.columns; ++tile) {
    const Format format(job, tile);
    for (int r = 0; r < job.num_rows; ++r) {
      store(totals + r * kTileColumns, begin == 0 ? splat(0.0f) : load_total(job, r, tile));
    }
    for (int64_t g = begin; g < end; ++g) {
      add_group_of_tile(job, blocks, format, g, scales.of[g - begin], totals);
    }
    for (int r = 0; r < job.num_rows; ++r) {
      store_total(job, r, tile, end, load(totals + r * kTileColumns));
    }
  }
}

}  // namespace fd::FD_ISA

#endif  // FD_ISA_AMX

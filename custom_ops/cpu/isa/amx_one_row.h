// One row times 2-bit tiles through the tile unit (AMX), whose products leave the vector unit to
// the decoding.
//
// One instruction multiplies a group's weights, decoded into a tile of 16 quads and 16 columns, by
// the digits of an activation, the rows of the other tile. The vector unit, which bounds the speed,
// so has 5 instructions for 64 weights instead of 8 (7 with two digits).
//
// What makes it fast or slow is the order. A tile is read once its stores have left the processor's
// pipeline, a product takes 52 cycles, and nothing behind either leaves before it: group by group,
// decoding, product and sums would wait for each other. Each stage is therefore some groups behind
// the one before, also from one tile of weights to the next.
#pragma once

#ifdef FD_ISA_AMX

#include "amx.h"
#include "weight_formats.h"

namespace fd::FD_ISA {

// Groups that a stage is behind the decoding.
constexpr int kProductsBehind = 2;
constexpr int kSumsBehind = 3;
constexpr int kJoiningBehind = 4;
constexpr int kRing = 4;  // groups whose weights, or sums, are kept

// Registers of even groups, and of odd ones.
struct EvenTiles {
  static constexpr int kWeights = 0, kDigits = 1, kSums = 2;
};
struct OddTiles {
  static constexpr int kWeights = 3, kDigits = 4, kSums = 5;
};
constexpr unsigned kShortTiles = 1u << EvenTiles::kDigits | 1u << EvenTiles::kSums |
                                 1u << OddTiles::kDigits | 1u << OddTiles::kSums;

// The groups of a job's tiles, one tile after the other.
struct GroupPlace {
  int tile = 0;
  int64_t g = 0;

  void advance(int64_t groups) {
    if (++g < groups) return;
    g = 0;
    ++tile;
  }
};

template <int kDigitCount>
class OneRow {
 public:
  explicit OneRow(const TileJob& job)
      : job_(job),
        row_(row_of(job, 0)),
        groups_(job.depth / kGroupRows),
        units_(groups_ * ((job.columns + kTileColumns - 1) / kTileColumns)) {}

  void run() {
    const TileShape shape(kDigitCount, kShortTiles);
    int64_t unit = 0;  // groups of all tiles, counted
    for (int tile = 0; unit < units_; ++tile) {
      const Ccq<IntegerDecoder> format(job_, tile);
      for (int64_t g = 0; g < groups_; g += 2, unit += 2) {  // 2 bits: their number is even
        decode(format, g, weights_[unit % kRing]);
        follow<EvenTiles, OddTiles>(unit);
        decode(format, g + 1, weights_[(unit + 1) % kRing]);
        follow<OddTiles, EvenTiles>(unit + 1);
      }
    }
    for (const int64_t end = unit + kJoiningBehind; unit < end; unit += 2) {
      follow<EvenTiles, OddTiles>(unit);
      follow<OddTiles, EvenTiles>(unit + 1);
    }
  }

 private:
  void decode(const Ccq<IntegerDecoder>& format, int64_t g, uint8_t* to) const {
    const uint8_t* stored = format.group(g);
    fetch_ahead<Ccq<IntegerDecoder>, 1>(job_, format.tile, stored);
#pragma GCC unroll 4
    for (int v = 0; v < kGroupQuads / kQuadsPerVector; ++v) {
      Quads quads[kQuadsPerVector];
      format.decoder.quads(stored + v * 64, quads);
      for (int i = 0; i < kQuadsPerVector; ++i) {
        store(to + (v * kQuadsPerVector + i) * 64, quads[i]);
      }
    }
  }

  // The stages behind the decoding of `unit`, whose registers are `Own`.
  template <typename Own, typename Other>
  void follow(int64_t unit) {
    static_assert(kProductsBehind % 2 == 0 && kSumsBehind % 2 == 1);
    if (is_one(unit - kProductsBehind)) multiply<Own>(unit - kProductsBehind);
    if (is_one(unit - kSumsBehind)) {
      tile_store<Other::kSums>(sums_[(unit - kSumsBehind) % kRing], 64);
    }
    if (is_one(unit - kJoiningBehind)) join_next(sums_[(unit - kJoiningBehind) % kRing]);
  }

  bool is_one(int64_t unit) const { return unit >= 0 && unit < units_; }

  template <typename Tiles>
  void multiply(int64_t unit) {
    tile_zero<Tiles::kSums>();
    tile_load<Tiles::kWeights>(weights_[unit % kRing], 64);
    tile_load<Tiles::kDigits>(row_.digits + multiplied_.g * kGroupDigitBytes, kGroupRows);
    tile_dot<Tiles::kSums, Tiles::kDigits, Tiles::kWeights>();
    multiplied_.advance(groups_);
  }

  void join_next(const int32_t (&sums)[kDigits][kTileColumns]) {
    const GroupNumbers& numbers = row_.groups[joined_.g];
    I16 digits[kDigitCount];
    for (int d = 0; d < kDigitCount; ++d) {
      digits[d] = add(load_ints(sums[d]), splat_int(numbers.start[d]));
    }
    const uint8_t* tile = job_.tile + joined_.tile * job_.tile_bytes;
    const F16 local = Ccq<IntegerDecoder>::local_of(tile, joined_.g);
    const F16 factor = Ccq<IntegerDecoder>::factor(local, splat(numbers.scale));
    total_ = fma(join(digits), factor, total_);
    const int whole = joined_.tile;
    joined_.advance(groups_);
    if (joined_.tile == whole) return;
    store_total(job_, 0, whole, groups_, total_);
    total_ = splat(0.0f);
  }

  const TileJob& job_;
  const Row row_;
  const int64_t groups_, units_;
  GroupPlace multiplied_, joined_;
  F16 total_ = splat(0.0f);
  alignas(64) uint8_t weights_[kRing][kWeightTileBytes];
  alignas(64) int32_t sums_[kRing][kDigits][kTileColumns];
};

FD_INLINE void multiply_one_row(const TileJob& job) {
  job.digit_count == kDigits ? OneRow<kDigits>(job).run() : OneRow<2>(job).run();
}

}  // namespace fd::FD_ISA

#endif  // FD_ISA_AMX

// Up to four rows times 2-bit tiles through the tile unit (AMX), whose products leave the vector
// unit to the decoding.
//
// One instruction multiplies a group's weights, decoded into a tile of 16 quads and 16 columns, by
// the digits of all activations, the rows of the other tile. The vector unit, which bounds the
// speed, so has 5 instructions for 64 weights, whose products would be another 2 or 3 a row.
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

constexpr int kMostFewRows = 4;
// Groups of K whose digits are laid side by side.
constexpr int64_t kMostGathered = 256;

FD_INLINE int8_t* gathered_digits() {
  alignas(64) static thread_local int8_t memory[kMostGathered * kMostFewRows * kGroupDigitBytes];
  return memory;
}

template <int kDigitCount, int kRows>
class FewRows {
 public:
  explicit FewRows(const TileJob& job)
      : job_(job),
        groups_(job.depth / kGroupRows),
        units_(groups_ * ((job.columns + kTileColumns - 1) / kTileColumns)),
        digits_(gather(job)) {
    for (int r = 0; r < kRows; ++r) {
      numbers_[r] = row_of(job, r).groups;
      total_[r] = splat(0.0f);
    }
  }

  void run() {
    const TileShape shape(kSums, kShortTiles);
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
  static constexpr int kSums = kRows * kDigitCount;  // rows of the tiles of digits and of sums
  // One row's digits lie as a tile wants them, but for those left out, which follow the others.
  static constexpr int64_t kDigitStep =
      (kRows == 1 ? kDigits : kSums) * static_cast<int64_t>(kGroupRows);

  // The digits of the rows, group by group.
  static const int8_t* gather(const TileJob& job) {
    if constexpr (kRows == 1) return row_of(job, 0).digits;
    int8_t* const memory = gathered_digits();
    int8_t* to = memory;
    for (int64_t g = 0; g < job.depth / kGroupRows; ++g) {
      for (int r = 0; r < kRows; ++r, to += kDigitCount * kGroupRows) {
        memcpy(to, row_of(job, r).digits + g * kGroupDigitBytes, kDigitCount * kGroupRows);
      }
    }
    return memory;
  }

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
    tile_load<Tiles::kDigits>(digits_ + multiplied_.g * kDigitStep, kGroupRows);
    tile_dot<Tiles::kSums, Tiles::kDigits, Tiles::kWeights>();
    multiplied_.advance(groups_);
  }

  void join_next(const int32_t (&sums)[kSums][kTileColumns]) {
    const uint8_t* tile = job_.tile + joined_.tile * job_.tile_bytes;
    const F16 local = Ccq<IntegerDecoder>::local_of(tile, joined_.g);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const GroupNumbers& numbers = numbers_[r][joined_.g];
      I16 digits[kDigitCount];
      for (int d = 0; d < kDigitCount; ++d) {
        digits[d] = add(load_ints(sums[r * kDigitCount + d]), splat_int(numbers.start[d]));
      }
      const F16 factor = Ccq<IntegerDecoder>::factor(local, splat(numbers.scale));
      total_[r] = fma(join(digits), factor, total_[r]);
    }
    const int whole = joined_.tile;
    joined_.advance(groups_);
    if (joined_.tile == whole) return;
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      store_total(job_, r, whole, groups_, total_[r]);
      total_[r] = splat(0.0f);
    }
  }

  const TileJob& job_;
  const int64_t groups_, units_;
  const int8_t* const digits_;
  const GroupNumbers* numbers_[kRows];
  GroupPlace multiplied_, joined_;
  F16 total_[kRows];
  alignas(64) uint8_t weights_[kRing][kWeightTileBytes];
  alignas(64) int32_t sums_[kRing][kSums][kTileColumns];
};

template <int kRows>
void multiply_few_rows(const TileJob& job) {
  job.digit_count == kDigits ? FewRows<kDigits, kRows>(job).run() : FewRows<2, kRows>(job).run();
}

// Whether there were so few rows that this has multiplied them.
FD_INLINE bool multiplied_few_rows(const TileJob& job) {
  if (job.num_rows == 1) return multiply_few_rows<1>(job), true;
  if (job.num_rows > kMostFewRows || job.depth / kGroupRows > kMostGathered) return false;
  if (job.num_rows == 2) return multiply_few_rows<2>(job), true;
  if (job.num_rows == 3) return multiply_few_rows<3>(job), true;
  return multiply_few_rows<4>(job), true;
}

}  // namespace fd::FD_ISA

#endif  // FD_ISA_AMX

// The quantised formats of weights as the kernels of an instruction set read them, and what all of
// those kernels do alike with a group's sums.
#pragma once

#include "../linear_kernels.h"
#include "ccq_codes.h"
#include "int_lanes.h"

namespace fd::FD_ISA {

// How sixteen quads of a group are read, and what a group's sums are worth: local(g) for the
// columns, factor() for a row of that scale. kNeedsDecoding: load_stored() cannot read what is kept
// in a tile, only what store() made of quad().

// How far ahead of the decoder a tile is fetched. The processor's own prefetching stops at every
// 4 KiB page, and decoding keeps too many instructions in flight to look past it: fetching by hand
// is what lets the ccq kernel read from memory as fast as from cache.
constexpr int64_t kFetchAhead = 2048;

// Decoder: ExactDecoder or IntegerDecoder, as the tile's columns allow.
template <typename Decoder>
struct Ccq {
  static constexpr int kGroupBytes = kCcqBlockBytes / 2;
  static constexpr int kOffset = ccq::kFieldOffset;
  static constexpr bool kNeedsDecoding = true;
  Decoder decoder;
  const uint8_t* tile;

  Ccq(const TileJob& job, int index)
      : decoder(job.codes[index]), tile(job.tile + index * job.tile_bytes) {}

  const uint8_t* group(int64_t g) const {
    return tile + (g >> 1) * kCcqBlockBytes + (g & 1) * kCcqGroupBytes;
  }
  static Quads load_stored(const uint8_t* p) { return load_quads(p); }
  Quads quad(const uint8_t* group, int q) const {
    return decoder.quad(group + q / kQuadsPerVector * 64, q % kQuadsPerVector);
  }
  F16 local(int64_t g) const {
    const I16 both = load_bytes(tile + (g >> 1) * kCcqBlockBytes + 2 * kCcqGroupBytes);
    return to_float((g & 1) ? bit_and(both, 15) : shift_right(both, 4));
  }
  static F16 factor(F16 local, F16 scale) { return mul(local, scale); }
};

struct Int8 {
  static constexpr int kGroupBytes = kInt8GroupBytes;
  static constexpr int kOffset = 128;
  static constexpr bool kNeedsDecoding = false;
  const uint8_t* tile;

  Int8(const TileJob& job, int index) : tile(job.tile + index * job.tile_bytes) {}
  const uint8_t* group(int64_t g) const { return tile + g * kInt8GroupBytes; }
  static Quads load_stored(const uint8_t* p) { return load_quads(p); }
  Quads quad(const uint8_t* group, int q) const { return load_quads(group + q * 64); }
  F16 local(int64_t) const { return splat(1.0f); }
  static F16 factor(F16, F16 scale) { return scale; }
};

struct Int4 {
  static constexpr int kGroupBytes = kInt4GroupBytes;
  static constexpr int kOffset = 8;
  static constexpr bool kNeedsDecoding = true;
  const uint8_t* tile;

  Int4(const TileJob& job, int index) : tile(job.tile + index * job.tile_bytes) {}
  const uint8_t* group(int64_t g) const { return tile + g * kInt4GroupBytes; }
  static Quads load_stored(const uint8_t* p) { return load_quads(p); }
  Quads quad(const uint8_t* group, int q) const {
    return load_nibbles(group + (q >> 1) * 64, q & 1);
  }
  F16 local(int64_t) const { return splat(1.0f); }
  static F16 factor(F16, F16 scale) { return scale; }
};

// Fetches one group's worth of tile `tile` kAhead bytes beyond `at`; past the tile's end that is
// the tile which this place of the block takes next. kLocality: 3 to the L1 cache, 2 to the L2.
template <typename Format, int kTiles, int kLocality = 3, int64_t kAhead = kFetchAhead>
FD_INLINE void fetch_ahead(const TileJob& job, const uint8_t* tile, const uint8_t* at) {
  const uint8_t* ahead = at + kAhead;
  if (ahead >= tile + job.tile_bytes) ahead += (kTiles - 1) * job.tile_bytes;
  for (int i = 0; i < Format::kGroupBytes; i += 64) __builtin_prefetch(ahead + i, 0, kLocality);
}

// --- a group's sums, and the results -----------------------------------------------------------

struct Row {
  const int8_t* digits;
  const GroupNumbers* groups;
};

FD_INLINE Row row_of(const TileJob& job, int i) {
  return {job.digits + i * job.digit_stride, job.groups + i * (job.depth / kGroupRows)};
}

// `count` rows of a job, from row `first` on.
FD_INLINE TileJob rows_of(const TileJob& job, int first, int count) {
  const Row row = row_of(job, first);
  TileJob part = job;
  part.digits = row.digits;
  part.groups = row.groups;
  part.num_rows = count;
  part.out = job.out + first * job.out_stride;
  return part;
}

// The exact sum of a group is 65536 h + 256 m + l; |256 h + m| < 2^29. Two digits: l is 0.
template <int kDigitCount>
FD_INLINE F16 join(const I16 (&sums)[kDigitCount]) {
  const F16 upper = to_float(add(shift_left(sums[0], 8), sums[1]));
  if constexpr (kDigitCount < kDigits) return mul(upper, splat(256.0f));
  return fma(upper, splat(256.0f), to_float(sums[kDigitCount - 1]));
}

// Row `row` of tile `tile` of the job.
FD_INLINE void store_columns(const TileJob& job, int row, int tile, F16 value) {
  float* out = job.out + row * job.out_stride + tile * kTileColumns;
  const int columns = job.columns - tile * kTileColumns;
  if (columns >= kTileColumns) {
    store(out, value);
  } else {
    store_first(out, value, columns);
  }
}

// The total of the groups [0, end): the result once all are in, else kept in its place.
FD_INLINE void store_total(const TileJob& job, int row, int tile, int64_t end, F16 total) {
  const bool whole = end * kGroupRows == job.depth;
  const F16 scale = load(job.scale + tile * kTileColumns);
  store_columns(job, row, tile, whole ? mul(total, scale) : total);
}
FD_INLINE F16 load_total(const TileJob& job, int row, int tile) {
  const float* kept = job.out + row * job.out_stride + tile * kTileColumns;
  return load_first(kept, job.columns - tile * kTileColumns, 0.0f);
}

}  // namespace fd::FD_ISA

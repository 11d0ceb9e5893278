// Linear maps over packed weights: one tile of 16 columns times a block of rows.
#include "../linear_kernels.h"
#include "int_lanes.h"

namespace fd::FD_ISA {
namespace {

// --- formats: how sixteen quads of a group are read, and the scale of a group --------------------

struct Ccq {
  F16 code_scale, code_offset;
  const uint8_t* tile;

  explicit Ccq(const TileJob& job)
      : code_scale(load(job.code_scale)), code_offset(load(job.code_offset)), tile(job.tile) {}

  const uint8_t* group(int64_t g) const {
    return tile + (g >> 1) * kCcqBlockBytes + (g & 1) * kCcqGroupBytes;
  }
  static Quads load_stored(const uint8_t* p) { return load_quads(p); }
  Quads quad(const uint8_t* group, int q) const {
    return decode_ccq(group + q * kTileColumns, code_scale, code_offset);
  }
  F16 factor(int64_t g, F16 scale) const {
    const I16 both = load_bytes(tile + (g >> 1) * kCcqBlockBytes + 2 * kCcqGroupBytes);
    const I16 local = (g & 1) ? bit_and(both, 15) : shift_right(both, 4);
    return mul(to_float(local), scale);
  }
};

struct Int8 {
  const uint8_t* tile;

  explicit Int8(const TileJob& job) : tile(job.tile) {}
  const uint8_t* group(int64_t g) const { return tile + g * kInt8GroupBytes; }
  static WideQuads load_stored(const uint8_t* p) { return load_wide_quads(p); }
  WideQuads quad(const uint8_t* group, int q) const { return load_wide_quads(group + q * 64); }
  F16 factor(int64_t, F16 scale) const { return scale; }
};

struct Int4 {
  const uint8_t* tile;

  explicit Int4(const TileJob& job) : tile(job.tile) {}
  const uint8_t* group(int64_t g) const { return tile + g * kInt4GroupBytes; }
  static Quads load_stored(const uint8_t* p) { return load_quads(p); }
  Quads quad(const uint8_t* group, int q) const {
    return load_nibbles(group + (q >> 1) * 64, q & 1);
  }
  F16 factor(int64_t, F16 scale) const { return scale; }
};

// --- one group of some rows ----------------------------------------------------------------------

struct Row {
  const int8_t* digits;
  const GroupNumbers* groups;
};

FD_INLINE Row row_of(const TileJob& job, int i) {
  const int64_t row = job.rows ? job.rows[i] : i;
  const int64_t groups = job.depth / kGroupRows;
  return {job.digits + row * groups * kGroupDigitBytes, job.groups + row * groups};
}

// The exact sum of a group is 65536 h + 256 m + l; |256 h + m| < 2^29.
FD_INLINE F16 join(const I16 (&sums)[kDigits]) {
  const I16 upper = add(shift_left(sums[0], 8), sums[1]);
  return fma(to_float(upper), splat(256.0f), to_float(sums[2]));
}

// Adds group g of kRows rows to `total`. `quad(q)` gives the weights of rows 4q .. 4q + 3.
template <int kRows, typename QuadAt, typename Factor>
FD_INLINE void add_group(const Row* rows, int64_t g, const QuadAt& quad, const Factor& factor,
                         F16 (&total)[kRows]) {
  I16 sums[kRows][kDigits];
  for (int r = 0; r < kRows; ++r) {
    for (int d = 0; d < kDigits; ++d) sums[r][d] = splat_int(rows[r].groups[g].start[d]);
  }
#pragma GCC unroll 16
  for (int q = 0; q < kGroupQuads; ++q) {
    const auto w = quad(q);
    for (int r = 0; r < kRows; ++r) {
      const int8_t* digits = rows[r].digits + g * kGroupDigitBytes + 4 * q;
      for (int d = 0; d < kDigits; ++d) {
        sums[r][d] = dot(sums[r][d], w, digits + d * kGroupRows);
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    total[r] = fma(join(sums[r]), factor(splat(rows[r].groups[g].scale)), total[r]);
  }
}

FD_INLINE void store_columns(const TileJob& job, int row, F16 value) {
  float* out = job.out + row * job.out_stride;
  if (job.columns == kTileColumns) {
    store(out, value);
  } else {
    store_first(out, value, job.columns);
  }
}

// Few rows: the weights go from memory through the decoder straight into the dot products.
template <typename Format, int kRows>
void stream_rows(const TileJob& job, int first) {
  const Format format(job);
  Row rows[kRows];
  F16 total[kRows];
  for (int r = 0; r < kRows; ++r) {
    rows[r] = row_of(job, first + r);
    total[r] = splat(0.0f);
  }
  const int64_t groups = job.depth / kGroupRows;
  for (int64_t g = 0; g < groups; ++g) {
    const uint8_t* weights = format.group(g);
    add_group<kRows>(
        rows, g, [&](int q) { return format.quad(weights, q); },
        [&](F16 scale) { return format.factor(g, scale); }, total);
  }
  const F16 scale = load(job.scale);
  for (int r = 0; r < kRows; ++r) store_columns(job, first + r, mul(total[r], scale));
}

// Rows [first, first + kRows) of group g, whose decoded quads lie in `decoded`.
template <typename Format, int kRows>
FD_INLINE void add_decoded(const TileJob& job, const Format& format, int64_t g, int first,
                           const uint8_t* decoded, float* totals) {
  Row rows[kRows];
  F16 total[kRows];
  for (int r = 0; r < kRows; ++r) {
    rows[r] = row_of(job, first + r);
    total[r] = load(totals + (first + r) * kTileColumns);
  }
  add_group<kRows>(
      rows, g, [&](int q) { return Format::load_stored(decoded + q * 64); },
      [&](F16 scale) { return format.factor(g, scale); }, total);
  for (int r = 0; r < kRows; ++r) store(totals + (first + r) * kTileColumns, total[r]);
}

// Many rows: a group is decoded once into the L1 cache and used for all rows.
template <typename Format>
void decode_then_rows(const TileJob& job) {
  alignas(64) uint8_t decoded[kGroupQuads * 64];
  alignas(64) float totals[kMaxRows * kTileColumns];
  memset(totals, 0, sizeof(float) * kTileColumns * (size_t)job.num_rows);
  const Format format(job);
  const int64_t groups = job.depth / kGroupRows;
  const int whole = job.num_rows - job.num_rows % kRowBlock;
  for (int64_t g = 0; g < groups; ++g) {
    const uint8_t* weights = format.group(g);
    for (int q = 0; q < kGroupQuads; ++q) store(decoded + q * 64, format.quad(weights, q));
    for (int i = 0; i < whole; i += kRowBlock) {
      add_decoded<Format, kRowBlock>(job, format, g, i, decoded, totals);
    }
    for (int i = whole; i < job.num_rows; ++i) {
      add_decoded<Format, 1>(job, format, g, i, decoded, totals);
    }
  }
  const F16 scale = load(job.scale);
  for (int i = 0; i < job.num_rows; ++i) {
    store_columns(job, i, mul(load(totals + i * kTileColumns), scale));
  }
}

template <typename Format>
void quantized_tile(const TileJob& job) {
  switch (job.num_rows) {
    case 1:
      return stream_rows<Format, 1>(job, 0);
    case 2:
      return stream_rows<Format, 2>(job, 0);
    case 3:
      return stream_rows<Format, 3>(job, 0);
    case 4:
      return stream_rows<Format, 4>(job, 0);
    default:
      return decode_then_rows<Format>(job);
  }
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
FD_INLINE void dense_rows(const TileJob& job, int first) {
  const Weight* tile = (const Weight*)job.tile;
  const float* x[kRows];
  F16 sums[kRows][2];
  for (int r = 0; r < kRows; ++r) {
    x[r] = job.x + (job.rows ? job.rows[first + r] : first + r) * job.x_stride;
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
  for (int r = 0; r < kRows; ++r) store_columns(job, first + r, add(sums[r][0], sums[r][1]));
}

template <typename Weight, int kRows>
void dense_remainder(const TileJob& job, int first) {
  if constexpr (kRows > 0) {
    if (job.num_rows - first >= kRows) return dense_rows<Weight, kRows>(job, first);
    dense_remainder<Weight, kRows - 1>(job, first);
  }
}

template <typename Weight>
void dense_tile(const TileJob& job) {
  int first = 0;
  for (; first + kDenseRowBlock <= job.num_rows; first += kDenseRowBlock) {
    dense_rows<Weight, kDenseRowBlock>(job, first);
  }
  dense_remainder<Weight, kDenseRowBlock - 1>(job, first);
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
    quantize_row,         quantized_tile<Ccq>, quantized_tile<Int8>, quantized_tile<Int4>,
    dense_tile<uint16_t>, dense_tile<float>,   gate_logits,          softmax,
    weighted_sum};

}  // namespace fd::FD_ISA

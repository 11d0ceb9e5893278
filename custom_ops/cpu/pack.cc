// From the layouts of a checkpoint to tiles, once at load.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "ccq.h"
#include "packed_weight.h"
#include "parallel.h"

namespace fd {
namespace {

void check_expert(const PackedWeight& weight, int64_t expert) {
  if (expert < 0 || expert >= weight.experts) {
    throw std::invalid_argument("expert is " + std::to_string(expert) + ", expected 0 to " +
                                std::to_string(weight.experts - 1));
  }
}

const float* finite_vector(const PackedWeight& weight, const char* name, const TensorView& view) {
  view.check_rank(name, 1).check_extent(name, 0, weight.out_features);
  const float* values = view.as<float>(name);
  for (int64_t n = 0; n < weight.out_features; ++n) {
    if (!std::isfinite(values[n])) {
      throw std::invalid_argument(std::string(name) + "[" + std::to_string(n) + "] is " +
                                  std::to_string(values[n]) + ", expected a finite number");
    }
  }
  return values;
}

void copy_padded(const PackedWeight& weight, int64_t expert, const float* source, float* target) {
  float* begin = target + weight.column(expert, 0);
  std::copy(source, source + weight.out_features, begin);
  std::fill(begin + weight.out_features, begin + weight.tiles() * kTileColumns, 0.0f);
}

int64_t columns_of_tile(const PackedWeight& weight, int64_t tile) {
  return std::min<int64_t>(kTileColumns, weight.out_features - tile * kTileColumns);
}

// Tiles [begin, end) for a thread, at least 64 KiB of the result.
template <typename Function>
void for_each_stretch(const PackedWeight& weight, const Function& function) {
  const int64_t grain = std::max<int64_t>(1, 65536 / weight.tile_bytes());
  parallel_for(weight.tiles(), grain, function);
}
template <typename Function>
void for_each_tile(const PackedWeight& weight, const Function& function) {
  for_each_stretch(weight, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) function(tile);
  });
}

template <typename Element>
void pack_dense_as(const PackedWeight& weight, int64_t expert, const TensorView& source,
                   bool transposed) {
  const Element* in = source.as<Element>("weight");
  const int64_t row = source.strides[0];
  const int64_t step_k = transposed ? 1 : row, step_n = transposed ? row : 1;
  for_each_tile(weight, [&](int64_t tile) {
    Element* out = reinterpret_cast<Element*>(weight.tile(expert, tile));
    const int64_t columns = columns_of_tile(weight, tile);
    for (int64_t k = 0; k < weight.in_features; ++k, out += kTileColumns) {
      const Element* from = in + k * step_k + tile * kTileColumns * step_n;
      for (int64_t c = 0; c < kTileColumns; ++c) out[c] = c < columns ? from[c * step_n] : 0;
    }
  });
}

// Bytes of an int8 or int4 tensor: any shape, no gaps, int8 or uint8.
const uint8_t* permuted_bytes(const TensorView& source, int64_t expected) {
  source.check_contiguous("quant_weight");
  if (dtype_size(source.dtype) != 1) {
    throw std::invalid_argument(std::string("quant_weight has dtype ") + dtype_name(source.dtype) +
                                ", expected int8 or uint8");
  }
  if (source.size() != expected) {
    throw std::invalid_argument("quant_weight has " + std::to_string(source.size()) +
                                " bytes, expected " + std::to_string(expected));
  }
  return static_cast<const uint8_t*>(source.data);
}

// The low bytes of four 16-bit numbers whose high ones are 0.
uint32_t every_other_byte(uint64_t four) {
  four = (four | four >> 8) & 0x0000ffff0000ffffu;
  return static_cast<uint32_t>(four | four >> 16);
}

// Rows 4q .. 4q + 3 of a column of 64 int8 values in a file, where row k stands at
// k / 16 * 16 + 2 * (k % 8) + k % 16 / 8: every other byte of eight. Byte by byte it took 4 times
// as long.
uint32_t int8_quad(const uint8_t* column, int q) {
  uint64_t eight;
  std::memcpy(&eight, column + q / 4 * 16 + q % 2 * 8, sizeof(eight));
  return every_other_byte((eight >> (q % 4 / 2 * 8)) & 0x00ff00ff00ff00ffu);
}
// Rows 8e .. 8e + 7 of a column of 64 int4 values in a file, as the bytes of four rows with the
// next four above them. Of 32 rows in a file, 16 bits hold the rows i, i + 8, i + 16 and i + 24.
// Nibble by nibble it took 13 times as long.
uint32_t int4_octet(const uint8_t* column, int e) {
  uint64_t low, high;
  std::memcpy(&low, column + e / 4 * 16, sizeof(low));
  std::memcpy(&high, column + e / 4 * 16 + 8, sizeof(high));
  constexpr uint64_t kNibbles = 0x000f000f000f000fu;
  const int shift = e % 4 * 4;
  return every_other_byte((low >> shift & kNibbles) | (high >> shift & kNibbles) << 4);
}

void require_kind(const PackedWeight& weight, WeightKind kind, const char* name) {
  if (weight.kind != kind) {
    throw std::invalid_argument(std::string("the weight was not allocated as ") + name);
  }
}

void check_code_range(int64_t count, const float* code_scale, const float* code_zp) {
  for (int64_t n = 0; n < count; ++n) {
    if (255.0f * std::fabs(code_scale[n]) + std::fabs(code_zp[n]) >= ccq::kMaxCode) {
      throw std::invalid_argument(
          "code_scale[" + std::to_string(n) + "] = " + std::to_string(code_scale[n]) +
          " with code_zp = " + std::to_string(code_zp[n]) + " gives codes beyond 2^30");
    }
  }
}

const uint8_t* byte_matrix(const char* name, const TensorView& view, int64_t rows,
                           int64_t columns) {
  view.check_rank(name, 2).check_extent(name, 0, rows).check_extent(name, 1, columns);
  return view.as<uint8_t>(name);
}

void copy_row(const uint8_t* from, int64_t columns, uint8_t* to) {
  std::memcpy(to, from, columns);
  if (columns < kTileColumns) std::memset(to + columns, 0, kTileColumns - columns);
}

// Four rows of 16 bytes as [16 columns][4].
void interleave(const uint8_t* rows, int64_t stride, uint8_t* out) {
  uint32_t words[kTileColumns];
  for (int c = 0; c < kTileColumns; ++c) {
    words[c] = rows[c] | rows[stride + c] << 8 | rows[2 * stride + c] << 16 |
               static_cast<uint32_t>(rows[3 * stride + c]) << 24;
  }
  std::memcpy(out, words, sizeof(words));
}

// The same of a tile that has fewer columns.
void interleave_some(const uint8_t* rows, int64_t stride, int64_t columns, uint8_t* out) {
  uint8_t padded[4 * kTileColumns];
  for (int r = 0; r < 4; ++r) copy_row(rows + r * stride, columns, padded + r * kTileColumns);
  interleave(padded, kTileColumns, out);
}

// 128 rows of a file: 32 rows of code bytes and one of local scales.
struct CcqBlock {
  const uint8_t* codes;
  int64_t stride;
  const uint8_t* locals;
};
void pack_block(const CcqBlock& from, int64_t first, int64_t columns, uint8_t* out) {
  for (int64_t r = 0; r < 32; r += 4) {
    const uint8_t* rows = from.codes + r * from.stride + first;
    if (columns == kTileColumns) {
      interleave(rows, from.stride, out + r * kTileColumns);
    } else {
      interleave_some(rows, from.stride, columns, out + r * kTileColumns);
    }
  }
  copy_row(from.locals + first, columns, out + 2 * kCcqGroupBytes);
}

// The meaning of a tile's bytes; what lies beyond its columns is never looked at.
void pack_codes(int64_t columns, const float* scale, const float* zero, CcqCodes& codes) {
  codes = {};
  for (int64_t c = 0; c < columns; ++c) {
    codes.exact.scale[c] = scale[c];
    codes.exact.offset[c] = ccq::code_offset(zero[c]);
  }
  pick(linear_kernels_tables).prove_codes(&codes);
}

}  // namespace

void pack_dense(const PackedWeight& weight, int64_t expert, const TensorView& source,
                bool transposed) {
  check_expert(weight, expert);
  const int64_t rows = transposed ? weight.out_features : weight.in_features;
  const int64_t columns = transposed ? weight.in_features : weight.out_features;
  source.check_rank("weight", 2).check_extent("weight", 0, rows).check_extent("weight", 1, columns);
  if (weight.kind == WeightKind::kFloat32) {
    pack_dense_as<float>(weight, expert, source, transposed);
  } else {
    require_kind(weight, WeightKind::kBFloat16, "dense");
    pack_dense_as<uint16_t>(weight, expert, source, transposed);
  }
}

void pack_int8(const PackedWeight& weight, int64_t expert, const TensorView& source,
               const TensorView& scale) {
  require_kind(weight, WeightKind::kInt8, "int8");
  check_expert(weight, expert);
  const uint8_t* in = permuted_bytes(source, weight.in_features * weight.out_features);
  copy_padded(weight, expert, finite_vector(weight, "weight_scale", scale), weight.scale);
  const int64_t groups = weight.groups();
  for_each_tile(weight, [&](int64_t tile) {
    uint8_t* out = weight.tile(expert, tile);
    for (int64_t g = 0; g < groups; ++g, out += kInt8GroupBytes) {
      for (int64_t c = 0; c < kTileColumns; ++c) {
        const int64_t n = tile * kTileColumns + c;
        const uint8_t* column = in + ((n / 2) * groups + g) * 128 + n % 2 * 64;
        for (int q = 0; q < kGroupQuads; ++q) {
          const uint32_t quad = int8_quad(column, q);
          std::memcpy(out + q * 64 + c * 4, &quad, sizeof(quad));
        }
      }
    }
  });
}

void pack_int4(const PackedWeight& weight, int64_t expert, const TensorView& source,
               const TensorView& scale) {
  require_kind(weight, WeightKind::kInt4, "int4");
  check_expert(weight, expert);
  const uint8_t* in = permuted_bytes(source, weight.in_features * weight.out_features / 2);
  copy_padded(weight, expert, finite_vector(weight, "weight_scale", scale), weight.scale);
  const int64_t groups = weight.groups();
  for_each_tile(weight, [&](int64_t tile) {
    uint8_t* out = weight.tile(expert, tile);
    for (int64_t g = 0; g < groups; ++g, out += kInt4GroupBytes) {
      for (int64_t c = 0; c < kTileColumns; ++c) {
        const int64_t n = tile * kTileColumns + c;
        const uint8_t* column = in + ((n / 4) * groups + g) * 128 + n % 4 * 32;
        for (int e = 0; e < kGroupRows / 8; ++e) {
          const uint32_t octet = int4_octet(column, e);
          std::memcpy(out + e * 64 + c * 4, &octet, sizeof(octet));
        }
      }
    }
  });
}

void pack_ccq(const PackedWeight& weight, int64_t expert, const TensorView& packed,
              const TensorView& local_scale, const TensorView& super_scale,
              const TensorView& code_scale, const TensorView& code_zp) {
  require_kind(weight, WeightKind::kCcq, "ccq");
  check_expert(weight, expert);
  const int64_t k = weight.in_features, n = weight.out_features;
  const uint8_t* codes = byte_matrix("quant_weight", packed, k / 4, n);
  const uint8_t* locals = byte_matrix("weight_scale", local_scale, k / 128, n);
  const float* supers = finite_vector(weight, "super_scales", super_scale);
  const float* slopes = finite_vector(weight, "code_scale", code_scale);
  const float* zeros = finite_vector(weight, "code_zp", code_zp);
  check_code_range(n, slopes, zeros);
  copy_padded(weight, expert, supers, weight.scale);
  CcqCodes* codes_of_tiles = weight.codes + expert * weight.tiles();
  // Blocks of rows outside, tiles inside: the file's rows are then read in runs, not 16 bytes at a
  // time, which took 2.5 times as long.
  for_each_stretch(weight, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t first = tile * kTileColumns;
      pack_codes(columns_of_tile(weight, tile), slopes + first, zeros + first,
                 codes_of_tiles[tile]);
    }
    for (int64_t block = 0; block < k / 128; ++block) {
      const CcqBlock from{codes + block * 32 * packed.strides[0], packed.strides[0],
                          locals + block * local_scale.strides[0]};
      for (int64_t tile = begin; tile < end; ++tile) {
        pack_block(from, tile * kTileColumns, columns_of_tile(weight, tile),
                   weight.tile(expert, tile) + block * kCcqBlockBytes);
      }
    }
  });
}

}  // namespace fd

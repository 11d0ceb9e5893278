#include "packed_weight.h"

#include <algorithm>
#include <stdexcept>

#include "parallel.h"
#include "stretches.h"

namespace fd {

WeightKind weight_kind(const std::string& name) {
  if (name == "bf16") return WeightKind::kBFloat16;
  if (name == "f32") return WeightKind::kFloat32;
  if (name == "int8") return WeightKind::kInt8;
  if (name == "int4") return WeightKind::kInt4;
  if (name == "ccq") return WeightKind::kCcq;
  throw std::invalid_argument("weight kind '" + name +
                              "' is unknown, expected bf16, f32, int8, int4 or ccq");
}

int64_t PackedWeight::tile_bytes() const {
  switch (kind) {
    case WeightKind::kBFloat16:
      return in_features * kTileColumns * 2;
    case WeightKind::kFloat32:
      return in_features * kTileColumns * 4;
    case WeightKind::kInt8:
      return groups() * kInt8GroupBytes;
    case WeightKind::kInt4:
      return groups() * kInt4GroupBytes;
    case WeightKind::kCcq:
      return groups() / 2 * kCcqBlockBytes;
  }
  return 0;
}

int32_t PackedWeight::offset() const {
  switch (kind) {
    case WeightKind::kInt8:
      return 128;
    case WeightKind::kInt4:
      return 8;
    case WeightKind::kCcq:
      return 32;
    default:
      return 0;
  }
}

void PackedWeight::check() const {
  const int64_t k_unit = kind == WeightKind::kCcq ? 2 * kGroupRows : quantized() ? kGroupRows : 1;
  const int64_t n_unit = kind == WeightKind::kCcq ? 8 : quantized() ? kTileColumns : 1;
  if (in_features < 1 || in_features % k_unit != 0) {
    throw std::invalid_argument("in_features is " + std::to_string(in_features) +
                                ", expected a positive multiple of " + std::to_string(k_unit));
  }
  if (out_features < 1 || out_features % n_unit != 0) {
    throw std::invalid_argument("out_features is " + std::to_string(out_features) +
                                ", expected a positive multiple of " + std::to_string(n_unit));
  }
  if (experts < 1) throw std::invalid_argument("experts is less than 1");
}

void quantize_rows(const float* x, int64_t stride, int64_t rows, const PackedWeight& weight,
                   int8_t* digits, GroupNumbers* groups) {
  parallel_stretches(rows, weight.in_features, 4096, [&](int64_t row, int64_t first, int64_t end) {
    quantize_stretch(weight, x + row * stride, row, first, end, digits, groups);
  });
}

void quantize_stretch(const PackedWeight& weight, const float* x, int64_t row, int64_t first,
                      int64_t end, int8_t* digits, GroupNumbers* groups) {
  const int64_t group = first / kGroupRows;
  pick(linear_kernels_tables)
      .quantize_row(x + first, end - first, weight.offset(), weight.activation_digits,
                    digits + digit_bytes(row, weight.in_features) + group * kGroupDigitBytes,
                    groups + row * weight.groups() + group);
}

Rows skip_rows(const PackedWeight& weight, const Rows& input, int64_t count) {
  if (!weight.quantized()) {
    return {input.x + count * input.x_stride, input.x_stride, nullptr, nullptr};
  }
  return {nullptr, 0, input.digits + digit_bytes(count, weight.in_features),
          input.groups + count * weight.groups()};
}

void multiply_tiles(const PackedWeight& weight, int64_t expert, int64_t begin, int64_t end,
                    const Rows& input, int64_t count, float* out, int64_t out_stride) {
  const LinearKernels& kernels = pick(linear_kernels_tables);
  void (*const by_kind[])(const TileJob&) = {kernels.bf16, kernels.f32, kernels.int8, kernels.int4,
                                             kernels.ccq};
  const int64_t column = weight.column(expert, begin);
  TileJob job{};
  job.tile = weight.tile(expert, begin);
  job.tile_bytes = weight.tile_bytes();
  job.depth = weight.in_features;
  job.columns =
      static_cast<int>(std::min(end * kTileColumns, weight.out_features) - begin * kTileColumns);
  if (weight.quantized()) job.scale = weight.scale + column;
  if (weight.kind == WeightKind::kCcq) job.codes = weight.codes + expert * weight.tiles() + begin;
  job.digit_count = weight.activation_digits;
  job.digit_stride = digit_row_bytes(weight.in_features);
  job.out_stride = out_stride;
  for (int64_t first = 0; first < count; first += kMaxRows) {
    job.num_rows = static_cast<int>(std::min<int64_t>(kMaxRows, count - first));
    const Rows block = skip_rows(weight, input, first);
    job.x = block.x;
    job.x_stride = block.x_stride;
    job.digits = block.digits;
    job.groups = block.groups;
    job.out = out + first * out_stride + begin * kTileColumns;
    by_kind[static_cast<int>(weight.kind)](job);
  }
}

int64_t tile_grain(const PackedWeight& weight, int64_t rows) {
  // About 0.03 ns a weight to read and decode and 0.015 ns for a row's product; 15 us a piece.
  const double nanoseconds =
      static_cast<double>(weight.in_features) * kTileColumns * (0.03 + 0.015 * rows);
  return std::max<int64_t>(1, static_cast<int64_t>(15000.0 / nanoseconds));
}

}  // namespace fd

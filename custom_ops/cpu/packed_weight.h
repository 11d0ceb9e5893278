// A packed weight as the ops see it: addresses inside tensors that Python keeps alive.
#pragma once

#include <cstdint>
#include <string>

#include "linear_kernels.h"
#include "tensor_view.h"

namespace fd {

enum class WeightKind { kBFloat16, kFloat32, kInt8, kInt4, kCcq };

// "bf16", "f32", "int8", "int4" or "ccq"; else std::invalid_argument.
WeightKind weight_kind(const std::string& name);

// One linear map, or `experts` of the same shape one behind the other.
struct PackedWeight {
  WeightKind kind;
  int64_t in_features;   // K
  int64_t out_features;  // N
  int64_t experts;       // at least 1
  uint8_t* data;         // [experts][tiles][tile_bytes], layouts in linear_kernels.h
  float* scale;          // [experts][tiles * 16]; null for dense kinds
  CcqCodes* codes;       // [experts][tiles]; null unless ccq
  // Of each activation that it multiplies: 3, or 2 for a coarser rounding; unused for dense kinds.
  int activation_digits = kDigits;

  bool quantized() const { return kind != WeightKind::kBFloat16 && kind != WeightKind::kFloat32; }
  int64_t tiles() const { return (out_features + kTileColumns - 1) / kTileColumns; }
  int64_t tile_bytes() const;
  int64_t groups() const { return in_features / kGroupRows; }
  // What the stored bytes have more than the weights.
  int32_t offset() const;
  uint8_t* tile(int64_t expert, int64_t index) const {
    return data + (expert * tiles() + index) * tile_bytes();
  }
  int64_t column(int64_t expert, int64_t index) const {
    return (expert * tiles() + index) * kTileColumns;
  }
  // Throws std::invalid_argument if the extents do not fit the kind.
  void check() const;
};

// Repack one expert from the layout of a checkpoint (docs/checkpoint_format.md). All throw
// std::invalid_argument that names the argument for a wrong dtype or shape, a scale that is not
// finite, or a code range outside 31 bits.
// source: uint16 (bf16 bits) or float32, [K, N], or [N, K] if transposed.
void pack_dense(const PackedWeight& weight, int64_t expert, const TensorView& source,
                bool transposed);
// source: the K * N (int8) or K * N / 2 (int4) bytes of the permuted file layout; scale float32
// [N].
void pack_int8(const PackedWeight& weight, int64_t expert, const TensorView& source,
               const TensorView& scale);
void pack_int4(const PackedWeight& weight, int64_t expert, const TensorView& source,
               const TensorView& scale);
// packed uint8 [K/4, N], local_scale uint8 [K/128, N], the rest float32 [N].
void pack_ccq(const PackedWeight& weight, int64_t expert, const TensorView& packed,
              const TensorView& local_scale, const TensorView& super_scale,
              const TensorView& code_scale, const TensorView& code_zp);

// Rows of float32 activations, cut into digits where the weight is quantised.
struct Rows {
  const float* x;
  int64_t x_stride;
  const int8_t* digits;
  const GroupNumbers* groups;
};

// `input` without its first `count` rows.
Rows skip_rows(const PackedWeight& weight, const Rows& input, int64_t count);

// Bytes of digits and of group numbers that `rows` rows of `depth` elements take.
inline int64_t digit_bytes(int64_t rows, int64_t depth) { return rows * digit_row_bytes(depth); }
inline int64_t group_bytes(int64_t rows, int64_t depth) {
  return rows * (depth / kGroupRows) * static_cast<int64_t>(sizeof(GroupNumbers));
}
// Rows as `weight` multiplies them; it is quantised.
void quantize_rows(const float* x, int64_t stride, int64_t rows, const PackedWeight& weight,
                   int8_t* digits, GroupNumbers* groups);
// The columns [first, end) of row `row`, which is `x`, alone; both are multiples of a group.
void quantize_stretch(const PackedWeight& weight, const float* x, int64_t row, int64_t first,
                      int64_t end, int8_t* digits, GroupNumbers* groups);

// Rows 0 .. count of `input` times the tiles [begin, end); the result's row i goes to
// out + i * out_stride, where `out` is column 0 of the whole result.
void multiply_tiles(const PackedWeight& weight, int64_t expert, int64_t begin, int64_t end,
                    const Rows& input, int64_t count, float* out, int64_t out_stride);

// Tiles that make a piece of work worth a thread, for `rows` rows.
int64_t tile_grain(const PackedWeight& weight, int64_t rows);

}  // namespace fd

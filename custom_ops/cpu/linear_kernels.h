// Packed weights as the linear kernels read them, and the table of kernels of an instruction set.
//
// Numbers. An activation row is cut in groups of 64; a group is written as scale * integer, the
// scale a power of two and the integers at most kMaxInteger in magnitude, so that the error of an
// element is at most 2^-22.99 of the group's largest one. An integer is kept as three signed bytes:
// 65536 h + 256 m + l. Where two digits are asked for, integers are multiples of 256: l is 0, and
// an error at most 2^-14.99 of the largest element. Weights are unsigned bytes. The three dot
// products of a group are exact in int32; they are joined in float32, times the local scale, and
// summed over the groups in order. So a result depends on its row and its column alone: not on the
// batch, the threads or the machine.
#pragma once

#include <cstdint>

#include "cpu_features.h"

namespace fd {

constexpr int kTileColumns = 16;
constexpr int kGroupRows = 64;
constexpr int kGroupQuads = kGroupRows / 4;
constexpr int kDigits = 3;
constexpr int kGroupDigitBytes = kDigits * kGroupRows;
// Largest 65536 h + 256 m + l with all three digits at most 127.
constexpr int kMaxInteger = 0x7f7f7f;
// The same where l is 0.
constexpr int kMaxTwoDigits = 0x7f7f00;
// Rows that one kernel call may be given.
constexpr int kMaxRows = 256;

// A tile is 16 columns; its bytes are read once, in order.
//   ccq:  for each 128 rows: 8 x [16 columns][4 quads of rows] code bytes, then for each column the
//         byte of two local scales: 528 bytes, 2.0625 bits a weight
//   int8: for each quad of rows [16 columns][4 rows], value + 128
//   int4: for each pair of quads [16 columns][4 rows], value + 8: even quad in the low nibbles
//   dense: [K][16 columns] bf16 bits or float32
constexpr int kCcqGroupBytes = kGroupQuads * kTileColumns;
constexpr int kCcqBlockBytes = 2 * kCcqGroupBytes + kTileColumns;
constexpr int kInt8GroupBytes = kGroupRows * kTileColumns;
constexpr int kInt4GroupBytes = kInt8GroupBytes / 2;

// What a byte of a ccq tile's 16 columns means: see ccq.h, or where all of the columns have
// integers that give the same codes, byte * slope + ((byte + shift) * fraction >> 16) + rest, whose
// lowest 15 bits are the code. Nothing but the products needs more than 16 bits.
struct CcqCodes {
  int32_t is_integer;
  union {
    struct {
      float scale[kTileColumns];
      float offset[kTileColumns];  // code_zp + 0.5
    } exact;
    struct {
      uint16_t slope[kTileColumns];
      uint16_t fraction[kTileColumns];
      uint16_t shift[kTileColumns];
      uint16_t rest[kTileColumns];
    } integer;
  };
};

// Beside the digits of one group of one row: what undoes the weights' offset, and the scale.
struct GroupNumbers {
  int32_t start[kDigits];  // -offset * sum of the digits h, m, l: where the dot products begin
  float scale;             // NaN if the group holds an infinity or a NaN
};

// Some tiles, one behind the other, times some rows.
struct TileJob {
  const uint8_t* tile;  // the first one
  int64_t tile_bytes;
  int columns;                 // of all tiles together; the last one may be ragged
  int64_t depth;               // K
  const float* scale;          // per column: super scale, weight scale (unused for dense)
  const CcqCodes* codes;       // per tile, ccq only
  const int8_t* digits;        // [rows][K / 64][3][64]
  int64_t digit_stride;        // bytes of a row of digits: digit_row_bytes(depth)
  const GroupNumbers* groups;  // [rows][K / 64]
  const float* x;              // dense only
  int64_t x_stride;
  int num_rows;  // at most kMaxRows
  // kDigits, or 2 where the last digit of every activation is zero: kernels may skip its products.
  int digit_count = kDigits;
  float* out;  // row i of the result goes to out + i * out_stride
  int64_t out_stride;
};

// An odd number of cache lines, so that the same group of neighbouring rows does not fall into the
// same set of a cache.
constexpr int64_t digit_row_bytes(int64_t depth) {
  return (depth / kGroupRows * kDigits | 1) * kGroupRows;
}

struct LinearKernels {
  // offset: 32 for ccq, 128 for int8, 8 for int4. digit_count: 3, or 2 for integers whose l is 0.
  void (*quantize_row)(const float* x, int64_t depth, int32_t offset, int digit_count,
                       int8_t* digits, GroupNumbers* groups);
  void (*ccq)(const TileJob& job);
  // Turns exact codes into integer ones if all columns of the tile allow it.
  void (*prove_codes)(CcqCodes* codes);
  void (*int8)(const TileJob& job);
  void (*int4)(const TileJob& job);
  void (*bf16)(const TileJob& job);
  void (*f32)(const TileJob& job);
  // logits[e] = sum over k of x[k] * gate[k * stride + e]
  void (*gate_logits)(const float* x, const float* gate, int64_t depth, int64_t stride, int experts,
                      float* logits);
  // In place: p[i] = e^(logits[i] - max) / sum
  void (*softmax)(float* logits, int count);
  // out = weights[0] * rows[positions[0]] + weights[1] * rows[positions[1]] + ..., in that order
  void (*weighted_sum)(const float* rows, int64_t stride, const int32_t* positions,
                       const float* weights, int count, int64_t width, float* out);
};

FD_DECLARE_KERNELS(LinearKernels, linear_kernels);

}  // namespace fd

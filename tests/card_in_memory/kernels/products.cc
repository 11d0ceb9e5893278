#pragma GCC optimize("O3")
#include "products.h"

#include <cstring>

namespace card {
namespace {

constexpr int kRows = 16, kDepth = 16, kTile = 8;  // of a warp's product; columns of one tile
using Eight = double __attribute__((vector_size(64)));

void widen(const uint16_t* from, float* to, int count, bool bf16) {
  if (bf16) {
    for (int i = 0; i < count; ++i) {
      const uint32_t bits = uint32_t{from[i]} << 16;
      std::memcpy(&to[i], &bits, 4);
    }
  } else {
    _Float16 half[kRows * kDepth];
    std::memcpy(half, from, count * 2);
    for (int i = 0; i < count; ++i) to[i] = static_cast<float>(half[i]);
  }
}

/// The row and column of a lane's element `i` of a tile of sums.
struct Place {
  int row, column;
  Place(int lane, int i) : row(lane / 4 + i / 2 * 8), column(lane % 4 * 2 + i % 2) {}
};

/// A warp's 16 rows of matrix A from four words of every lane.
struct Rows {
  float at[kRows][kDepth];

  Rows(const uint32_t* const (&words)[kLanes], bool bf16) {
    uint16_t raw[kRows][kDepth];
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int i = 0; i < 4; ++i) {
        std::memcpy(&raw[lane / 4 + i % 2 * 8][lane % 4 * 2 + i / 2 * 8], &words[lane][i], 4);
      }
    }
    widen(raw[0], at[0], kRows * kDepth, bf16);
  }
};

/// sums += rows times columns, [8][16].
void multiply_tile(const Rows& rows, const uint16_t (&columns)[kTile][kDepth], bool bf16,
                   float (&sums)[kRows][kTile]) {
  float wide[kTile][kDepth];
  widen(columns[0], wide[0], kTile * kDepth, bf16);
  Eight by_depth[kDepth];
  for (int k = 0; k < kDepth; ++k) {
    for (int n = 0; n < kTile; ++n) by_depth[k][n] = wide[n][k];
  }
  for (int m = 0; m < kRows; ++m) {
    Eight sum;
    for (int n = 0; n < kTile; ++n) sum[n] = sums[m][n];
    for (int k = 0; k < kDepth; ++k) sum += by_depth[k] * static_cast<double>(rows.at[m][k]);
    for (int n = 0; n < kTile; ++n) sums[m][n] = static_cast<float>(sum[n]);
  }
}

/// Element [n][k] of a matrix with rows of 128 bytes in the 128-byte swizzle.
uint32_t swizzled(uint64_t matrix, int n, int k) {
  const uint32_t start = (matrix & 0x3fff) << 4, eight_rows = (matrix >> 32 & 0x3fff) << 4;
  const uint32_t at = start + n / 8 * eight_rows + n % 8 * 128 + k * 2;
  return at ^ (at >> 7 & 7) << 4;
}

}  // namespace

void multiply_parts(Warp& warp) {
  if (warp.present != ~0u) fail("a product needs all lanes of the warp");
  const uint32_t* a[kLanes];
  uint16_t columns[kTile][kDepth];
  float sums[kRows][kTile];
  bool bf16 = false;
  for (int lane = 0; lane < kLanes; ++lane) {
    const MmaPart& part = *static_cast<const MmaPart*>(warp.brought[lane]);
    a[lane] = part.a;
    bf16 = part.bf16;
    for (int i = 0; i < 2; ++i)
      std::memcpy(&columns[lane / 4][lane % 4 * 2 + 8 * i], &part.b[i], 4);
    for (int i = 0; i < 4; ++i) {
      const Place place(lane, i);
      sums[place.row][place.column] = part.c == nullptr ? 0.0f : part.c[i];
    }
  }
  multiply_tile(Rows(a, bf16), columns, bf16, sums);
  for (int lane = 0; lane < kLanes; ++lane) {
    const MmaPart& part = *static_cast<const MmaPart*>(warp.brought[lane]);
    for (int i = 0; i < 4; ++i) {
      const Place place(lane, i);
      part.d[i] = sums[place.row][place.column];
    }
  }
}

void multiply_byte_parts(Warp& warp) {
  if (warp.present != ~0u) fail("a product needs all lanes of the warp");
  constexpr int kBytes = 2 * kDepth;
  uint8_t rows[kRows][kBytes];
  int8_t columns[kTile][kBytes];
  for (int lane = 0; lane < kLanes; ++lane) {
    const ByteMmaPart& part = *static_cast<const ByteMmaPart*>(warp.brought[lane]);
    for (int i = 0; i < 4; ++i) {
      std::memcpy(&rows[lane / 4 + i % 2 * 8][lane % 4 * 4 + i / 2 * 16], &part.a[i], 4);
    }
    for (int i = 0; i < 2; ++i) {
      std::memcpy(&columns[lane / 4][lane % 4 * 4 + 16 * i], &part.b[i], 4);
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    const ByteMmaPart& part = *static_cast<const ByteMmaPart*>(warp.brought[lane]);
    for (int i = 0; i < 4; ++i) {
      const Place place(lane, i);
      for (int k = 0; k < kBytes; ++k) {
        part.d[i] += int{rows[place.row][k]} * columns[place.column][k];
      }
    }
  }
}

void multiply(const Product& product, const uint8_t* shared, float* sums) {
  const Rows rows(product.a, product.bf16);
  const int each = product.columns / 2;
  for (int tile = 0; tile < product.columns / kTile; ++tile) {
    uint16_t columns[kTile][kDepth];
    float tile_sums[kRows][kTile];
    for (int n = 0; n < kTile; ++n) {
      for (int k = 0; k < kDepth; k += 8) {  // 16 bytes stay together
        std::memcpy(&columns[n][k], shared + swizzled(product.matrix, tile * kTile + n, k), 16);
      }
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const Place place(lane, i);
        const float before = sums[lane * each + tile * 4 + i];
        tile_sums[place.row][place.column] = product.onto ? before : 0.0f;
      }
    }
    multiply_tile(rows, columns, product.bf16, tile_sums);
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const Place place(lane, i);
        sums[lane * each + tile * 4 + i] = tile_sums[place.row][place.column];
      }
    }
  }
}

}  // namespace card

// The instructions of the tile unit (AMX) and the shape of its registers.
#pragma once

#ifdef FD_ISA_AMX

#include "../linear_kernels.h"
#include "int_lanes.h"

namespace fd::FD_ISA {

constexpr int kTileRows16 = 16;
constexpr int kWeightTileBytes = kGroupQuads * 64;

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
// sums += digits * weights: both signed bytes
template <int kSums>
FD_INLINE void tile_dot() {
  __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"n"(kSums), "n"(kDigitTile),
                   "n"(kWeightTile)
                   : "memory");
}

// Shapes the registers, and gives them back at the end: other code then runs, and other threads are
// switched to, without the burden of their state.
class TileShape {
 public:
  TileShape() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < kOddSums + kDigits; ++i) {
      config.row_bytes[i] = 64;
      config.rows[i] = kTileRows16;
    }
    __asm__ volatile("ldtilecfg (%0)" ::"r"(&config) : "memory");
  }
  TileShape(const TileShape&) = delete;
  TileShape& operator=(const TileShape&) = delete;
  ~TileShape() { __asm__ volatile("tilerelease" ::: "memory"); }
};

}  // namespace fd::FD_ISA

#endif  // FD_ISA_AMX

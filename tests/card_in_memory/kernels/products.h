// Products of matrices as the tensor cores take them.
//
// Every sum is exact but for one rounding to float32 after 16 products: the order of a card's own
// sum within those 16 is not known and not IEEE's. So results are near a card's, not its bits;
// among products, of mma and of wgmma, equal rows and columns give equal bits, as on the card.
#pragma once

#include <cstdint>

#include "machine.h"

namespace card {

/// One lane's part of mma.m16n8k16.
struct MmaPart {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
  const float* c;  // null: zeros
  bool bf16;
};

/// The product whose parts a warp's lanes have brought.
void multiply_parts(Warp& warp);

/// One lane's part of mma.m16n8k32, of unsigned bytes times signed ones onto `d`.
struct ByteMmaPart {
  int* d;
  const uint32_t* a;
  uint32_t b[2];
};

/// The same for such parts.
void multiply_byte_parts(Warp& warp);

/// Onto `sums`, [lane][columns / 2] as lanes hold them.
void multiply(const Product& product, const uint8_t* shared, float* sums);

}  // namespace card

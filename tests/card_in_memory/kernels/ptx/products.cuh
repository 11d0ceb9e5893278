// Stands for custom_ops/cuda/ptx/products.cuh.
#pragma once

#include <cuda_runtime.h>

#include "products.h"

namespace fd::cuda {

inline void multiply_lanes(card::MmaPart part) {
  card::meet(card::Meeting::kProduct, card::multiply_parts, &part);
}
inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  multiply_lanes({d, a, {b0, b1}, d, true});
}
inline void mma_first(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  multiply_lanes({d, a, {b0, b1}, nullptr, true});
}
inline void mma_onto(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                     const float (&c)[4]) {
  multiply_lanes({d, a, {b0, b1}, c, true});
}
inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  multiply_lanes({d, a, {b0, b1}, d, false});
}

inline void mma_u8s8(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  card::ByteMmaPart part{d, a, {b0, b1}};
  card::meet(card::Meeting::kProduct, card::multiply_byte_parts, &part);
}

/// A lane's part of ldmatrix and stmatrix: the row that it names, and what it gets or has.
struct MatrixPart {
  uint8_t* row;
  uint32_t words[4];
};

inline uint8_t* row_at(uint32_t address) {
  if (address % 16 != 0) card::fail("a row of a matrix is not aligned");
  return card::shared_at(address, 16);
}

inline uint4 load_matrices(const void* row) {
  MatrixPart part{row_at(card::shared_offset(row)), {}};
  auto load = [](card::Warp& warp) {
    for (int lane = 0; lane < card::kLanes; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const auto& named = *static_cast<MatrixPart*>(warp.brought[8 * i + lane / 4]);
        auto& mine = *static_cast<MatrixPart*>(warp.brought[lane]);
        std::memcpy(&mine.words[i], named.row + lane % 4 * 4, 4);
      }
    }
  };
  card::meet(card::Meeting::kMatrices, load, &part);
  return make_uint4(part.words[0], part.words[1], part.words[2], part.words[3]);
}

inline void store_transposed(uint32_t row, uint32_t pair) {
  MatrixPart part{row_at(row), {pair}};
  auto store = [](card::Warp& warp) {
    for (int lane = 0; lane < card::kLanes; ++lane) {
      const uint32_t pair = static_cast<MatrixPart*>(warp.brought[lane])->words[0];
      for (int i = 0; i < 2; ++i) {  // element [row lane / 4][column 2 (lane % 4) + i] before
        const auto& named = *static_cast<MatrixPart*>(warp.brought[lane % 4 * 2 + i]);
        const auto element = static_cast<uint16_t>(pair >> 16 * i);
        std::memcpy(named.row + lane / 4 * 2, &element, 2);
      }
    }
  };
  card::meet(card::Meeting::kMatrices, store, &part);
}

}  // namespace fd::cuda

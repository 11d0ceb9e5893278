// Stands for custom_ops/cuda/ptx/arithmetic.cuh.
#pragma once

#include <cuda_fp16.h>

namespace fd::cuda {

inline uint32_t and_or(uint32_t a, uint32_t b, uint32_t c) { return (a & b) | c; }

inline uint32_t multiply_add(uint32_t a, uint32_t b, uint32_t c) { return a * b + c; }

/// a * b + c of float16, rounded once.
inline uint32_t fma_half(uint32_t a, uint32_t b, uint32_t c) {
  auto wide = [](uint32_t bits) {
    return static_cast<float>(same_bits<_Float16>(static_cast<uint16_t>(bits)));
  };
  const float product = wide(a) * wide(b), addend = wide(c);  // 22 bits: exact
  const float sum = product + addend, part = sum - product;
  const float rest = (product - (sum - part)) + (addend - part);
  const bool exact = rest == 0 || !(std::fabs(sum) < INFINITY);
  const _Float16 near = exact ? static_cast<_Float16>(sum)
                              : static_cast<_Float16>(static_cast<double>(product) + addend);
  return same_bits<uint16_t>(near);
}

inline uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
  return fma_half(a, b, c) | fma_half(a >> 16, b >> 16, c >> 16) << 16;
}

template <int kHalf>
uint32_t fma2_half(uint32_t a, uint32_t b, uint32_t c) {
  constexpr int kShift = 16 * kHalf;
  return fma_half(a, b >> kShift, c >> kShift) | fma_half(a >> 16, b >> kShift, c >> kShift) << 16;
}

inline float exp2_fast(float x) { return std::exp2(x); }

}  // namespace fd::cuda

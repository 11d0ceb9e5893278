// Stands for CUDA's header of float16.
#pragma once

#include "cuda_runtime.h"

struct __half {
  unsigned short bits;
};
struct alignas(4) __half2 {
  __half x, y;
};
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline float __half2float(__half h) { return static_cast<float>(same_bits<_Float16>(h.bits)); }
inline __half card_half(float value) {
  return {same_bits<unsigned short>(static_cast<_Float16>(value))};
}
inline __half2 __floats2half2_rn(float low, float high) {
  return {card_half(low), card_half(high)};
}

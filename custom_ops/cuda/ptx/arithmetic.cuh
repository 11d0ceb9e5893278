// Arithmetic for which C++ has no expression that becomes the one instruction wanted.
#pragma once

#include <cstdint>

namespace fd::cuda {

#ifdef __CUDACC__

/// (a & b) | c in one instruction.
__device__ __forceinline__ uint32_t and_or(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

/// Low 32 bits of a * b + c.
__device__ __forceinline__ uint32_t multiply_add(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("mad.lo.u32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

/// a * b + c for both halves of pairs of float16.
__device__ __forceinline__ uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

/// a * b + c where b and c are one half of each pair: the instruction can take a half twice.
template <int kHalf>
__device__ __forceinline__ uint32_t fma2_half(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  if constexpr (kHalf == 0) {
    asm("{\n.reg .b16 l, h, m, n;\n.reg .b32 p, q;\n"
        "mov.b32 {l, h}, %2;\nmov.b32 {m, n}, %3;\nmov.b32 p, {l, l};\nmov.b32 q, {m, m};\n"
        "fma.rn.f16x2 %0, %1, p, q;\n}\n"
        : "=r"(d)
        : "r"(a), "r"(b), "r"(c));
  } else {
    asm("{\n.reg .b16 l, h, m, n;\n.reg .b32 p, q;\n"
        "mov.b32 {l, h}, %2;\nmov.b32 {m, n}, %3;\nmov.b32 p, {h, h};\nmov.b32 q, {n, n};\n"
        "fma.rn.f16x2 %0, %1, p, q;\n}\n"
        : "=r"(d)
        : "r"(a), "r"(b), "r"(c));
  }
  return d;
}

/// 2^x; exactly 1 at 0 and 0 at -inf.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

#endif  // __CUDACC__

}  // namespace fd::cuda

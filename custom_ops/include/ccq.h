// The CCQ ("WINT2") code: one byte and two per-column numbers give four weights.
//
//   d      = floor(fma(byte, code_scale, code_zp + 0.5))       float32, one fused rounding
//   v[j]   = ((d >> (9 - 3 * j)) & 63) - 32                    j = 0..3 for rows 4r .. 4r + 3
//   weight = v[j] * local_scale * super_scale
//
// The same statement in numpy is fastdeploy_lite/quantization/ccq.py; both are compared bit for
// bit.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FD_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FD_HOST_DEVICE inline
#endif

namespace fd::ccq {

constexpr int kRowsPerByte = 4;
constexpr int kGroupRows = 64;    // rows under one local scale
constexpr int kFieldOffset = 32;  // a field holds weight + 32
constexpr int kFieldMask = 63;
constexpr int kCodeMask = 0x7fff;

// |d| stays in 31 bits for all bytes if 255 * |code_scale| + |code_zp| does; checked at load.
constexpr float kMaxCode = 1073741824.0f;

// The addend of the fused multiply-add: rounded to float32 before it is used.
FD_HOST_DEVICE float code_offset(float code_zp) { return code_zp + 0.5f; }

// The 15-bit code of a byte.
FD_HOST_DEVICE int code(uint8_t byte, float code_scale, float offset) {
#ifdef __CUDA_ARCH__
  return __float2int_rd(__fmaf_rn(static_cast<float>(byte), code_scale, offset)) & kCodeMask;
#else
  const float sum = __builtin_fmaf(static_cast<float>(byte), code_scale, offset);
  return static_cast<int>(__builtin_floorf(sum)) & kCodeMask;
#endif
}

// Weight + 32 (0..63) of row 4r + j.
FD_HOST_DEVICE int field(int code, int j) { return (code >> (9 - 3 * j)) & kFieldMask; }

// The four fields of a code as bytes, row 4r in the lowest: the operand of a four-byte dot product.
FD_HOST_DEVICE uint32_t fields(int code) {
  return static_cast<uint32_t>(field(code, 0)) | static_cast<uint32_t>(field(code, 1)) << 8 |
         static_cast<uint32_t>(field(code, 2)) << 16 | static_cast<uint32_t>(field(code, 3)) << 24;
}

}  // namespace fd::ccq

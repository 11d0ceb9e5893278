// The table of row-wise kernels that each instruction set provides (cpu/isa/rowwise.cc).
#pragma once

#include <cstdint>

#include "cpu_features.h"

namespace fd {

struct RowwiseKernels {
  // out = x / rms(x) * weight; x and out may be the same row. The weight is float32 or bf16 bits.
  void (*rms_norm_f32)(const float* x, const float* weight, float epsilon, int64_t width,
                       float* out);
  void (*rms_norm_bf16)(const float* x, const uint16_t* weight, float epsilon, int64_t width,
                        float* out);
  // residual += x, then out = norm(residual) * weight.
  void (*add_rms_norm_f32)(const float* x, float* residual, const float* weight, float epsilon,
                           int64_t width, float* out);
  void (*add_rms_norm_bf16)(const float* x, float* residual, const uint16_t* weight, float epsilon,
                            int64_t width, float* out);
  // out = gate * sigmoid(gate) * up
  void (*silu_and_mul)(const float* gate, const float* up, int64_t width, float* out);
  // x += y
  void (*add_to)(float* x, const float* y, int64_t width);
  // Adjacent pairs (x[2i], x[2i+1]) turned by the angle whose cosine and sine are
  // cos_sin[i] and cos_sin[width / 2 + i].
  void (*rotate)(const float* x, const float* cos_sin, int64_t width, float* out);
  // out = e^x
  void (*exponential)(const float* x, int64_t width, float* out);
};

FD_DECLARE_KERNELS(RowwiseKernels, rowwise_kernels);

}  // namespace fd

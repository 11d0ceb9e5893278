// Norms, SwiGLU, sums and gathers over rows (CPU). Rows are float32 with a stride between them.
#pragma once

#include <cstdint>

namespace fd::cpu {

template <typename T>
struct Rows {
  T* data;
  int64_t count;
  int64_t width;
  int64_t stride;

  T* operator[](int64_t r) const { return data + r * stride; }
};

// A weight of `width` elements, float32 or bf16 bits: one pointer is null.
struct NormWeight {
  const float* f32;
  const uint16_t* bf16;
};

void rms_norm(Rows<const float> x, NormWeight weight, float epsilon, Rows<float> out);
void add_rms_norm(Rows<const float> x, Rows<float> residual, NormWeight weight, float epsilon,
                  Rows<float> out);
// x is [rows, 2 width]: gate, then up.
void silu_and_mul(Rows<const float> x, Rows<float> out);
void add_inplace(Rows<float> x, Rows<const float> y);
// out[r] = x[rows[r]]. Throws std::invalid_argument for an index out of range.
void gather_rows(Rows<const float> x, const int32_t* rows, Rows<float> out);

}  // namespace fd::cpu

// bf16 rows to float32 ones and back, for activations that come from a card and go back to it.
#pragma once

#include <cstdint>

#include "rowwise.h"

namespace fd::cpu {

// out[r] = x[r], exactly.
void widen(Rows<const uint16_t> x, Rows<float> out);
// out[r] = x[r] rounded to the nearest bf16, ties to even; NaN stays NaN.
void narrow(Rows<const float> x, Rows<uint16_t> out);

// The same of one row of `count` elements, on the calling thread.
void widen_row(const uint16_t* x, int64_t count, float* out);
void narrow_row(const float* x, int64_t count, uint16_t* out);

}  // namespace fd::cpu

#include "rowwise.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "parallel.h"
#include "rowwise_kernels.h"

namespace fd::cpu {
namespace {

// Rows worth a thread's while: some 10 us at a quarter of a nanosecond an element.
int64_t grain(int64_t width) { return std::max<int64_t>(1, 40000 / std::max<int64_t>(width, 1)); }

template <typename Function>
void each_row(int64_t count, int64_t width, const Function& function) {
  parallel_for(count, grain(width), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) function(r);
  });
}

}  // namespace

void rms_norm(Rows<const float> x, NormWeight weight, float epsilon, Rows<float> out) {
  const RowwiseKernels& k = pick(rowwise_kernels_tables);
  each_row(x.count, x.width, [&](int64_t r) {
    if (weight.f32) {
      k.rms_norm_f32(x[r], weight.f32, epsilon, x.width, out[r]);
    } else {
      k.rms_norm_bf16(x[r], weight.bf16, epsilon, x.width, out[r]);
    }
  });
}

void add_rms_norm(Rows<const float> x, Rows<float> residual, NormWeight weight, float epsilon,
                  Rows<float> out) {
  const RowwiseKernels& k = pick(rowwise_kernels_tables);
  each_row(x.count, x.width, [&](int64_t r) {
    if (weight.f32) {
      k.add_rms_norm_f32(x[r], residual[r], weight.f32, epsilon, x.width, out[r]);
    } else {
      k.add_rms_norm_bf16(x[r], residual[r], weight.bf16, epsilon, x.width, out[r]);
    }
  });
}

void silu_and_mul(Rows<const float> x, Rows<float> out) {
  const RowwiseKernels& k = pick(rowwise_kernels_tables);
  each_row(x.count, x.width,
           [&](int64_t r) { k.silu_and_mul(x[r], x[r] + out.width, out.width, out[r]); });
}

void add_inplace(Rows<float> x, Rows<const float> y) {
  const RowwiseKernels& k = pick(rowwise_kernels_tables);
  each_row(x.count, x.width, [&](int64_t r) { k.add_to(x[r], y[r], x.width); });
}

void gather_rows(Rows<const float> x, const int32_t* rows, Rows<float> out) {
  for (int64_t r = 0; r < out.count; ++r) {
    if (rows[r] < 0 || rows[r] >= x.count) {
      throw std::invalid_argument("gather_rows: rows[" + std::to_string(r) + "] is " +
                                  std::to_string(rows[r]) + ", x has rows 0 to " +
                                  std::to_string(x.count - 1));
    }
  }
  each_row(out.count, out.width, [&](int64_t r) {
    std::memcpy(out[r], x[rows[r]], sizeof(float) * static_cast<size_t>(out.width));
  });
}

}  // namespace fd::cpu

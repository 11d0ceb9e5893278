// Row-wise kernels: RMSNorm, SwiGLU, sums, rotary embedding. One row never sees another.
#include "../rowwise_kernels.h"
#include "lanes.h"

namespace fd::FD_ISA {
namespace {

FD_INLINE F16 load_weight(const float* p, int n) {
  return n >= 16 ? load(p) : load_first(p, n, 0.0f);
}
FD_INLINE F16 load_weight(const uint16_t* p, int n) {
  if (n >= 16) return load_bf16(p);
  uint16_t padded[16] = {};
  for (int i = 0; i < n; ++i) padded[i] = p[i];
  return load_bf16(padded);
}
FD_INLINE F16 load_row(const float* p, int64_t n) {
  return n >= 16 ? load(p) : load_first(p, (int)n, 0.0f);
}
FD_INLINE void store_row(float* p, F16 a, int64_t n) {
  if (n >= 16) {
    store(p, a);
  } else {
    store_first(p, a, (int)n);
  }
}

// 1 / rms of a row, after adding `x` to it when kAdd. Four partial sums of sixteen lanes: as many
// additions in flight as the adders take, and a shorter chain of roundings.
template <bool kAdd>
FD_INLINE float inverse_rms(float* row, const float* x, int64_t width, float epsilon) {
  F16 sum[4] = {splat(0.0f), splat(0.0f), splat(0.0f), splat(0.0f)};
  for (int64_t i = 0; i < width; i += 64) {
    for (int k = 0; k < 4; ++k) {
      const int64_t at = i + 16 * k;
      if (at >= width) break;
      F16 value = load_row(row + at, width - at);
      if (kAdd) {
        value = add(value, load_row(x + at, width - at));
        store_row(row + at, value, width - at);
      }
      sum[k] = fma(value, value, sum[k]);
    }
  }
  const float squares = reduce_add(add(add(sum[0], sum[1]), add(sum[2], sum[3])));
  return 1.0f / __builtin_sqrtf(squares / (float)width + epsilon);
}

template <typename Weight>
FD_INLINE void scale_row(const float* x, const Weight* weight, float scale, int64_t width,
                         float* out) {
  const F16 factor = splat(scale);
  for (int64_t i = 0; i < width; i += 16) {
    const int64_t left = width - i;
    const F16 normal = mul(load_row(x + i, left), factor);
    store_row(out + i, mul(normal, load_weight(weight + i, left < 16 ? (int)left : 16)), left);
  }
}

template <typename Weight>
void rms_norm(const float* x, const Weight* weight, float epsilon, int64_t width, float* out) {
  const float scale = inverse_rms<false>(const_cast<float*>(x), nullptr, width, epsilon);
  scale_row(x, weight, scale, width, out);
}

template <typename Weight>
void add_rms_norm(const float* x, float* residual, const Weight* weight, float epsilon,
                  int64_t width, float* out) {
  const float scale = inverse_rms<true>(residual, x, width, epsilon);
  scale_row(residual, weight, scale, width, out);
}

void silu_and_mul(const float* gate, const float* up, int64_t width, float* out) {
  const F16 one = splat(1.0f), zero = splat(0.0f);
  for (int64_t i = 0; i < width; i += 16) {
    const int64_t left = width - i;
    const F16 g = load_row(gate + i, left);
    const F16 silu = div(g, add(one, exp16(sub(zero, g))));
    store_row(out + i, mul(silu, load_row(up + i, left)), left);
  }
}

void add_to(float* x, const float* y, int64_t width) {
  for (int64_t i = 0; i < width; i += 16) {
    const int64_t left = width - i;
    store_row(x + i, add(load_row(x + i, left), load_row(y + i, left)), left);
  }
}

void rotate(const float* x, const float* cos_sin, int64_t width, float* out) {
  const float* cosine = cos_sin;
  const float* sine = cos_sin + width / 2;
  for (int64_t i = 0; i < width / 2; ++i) {
    const float even = x[2 * i], odd = x[2 * i + 1];
    out[2 * i] = even * cosine[i] - odd * sine[i];
    out[2 * i + 1] = odd * cosine[i] + even * sine[i];
  }
}

void exponential(const float* x, int64_t width, float* out) {
  for (int64_t i = 0; i < width; i += 16) {
    store_row(out + i, exp16(load_row(x + i, width - i)), width - i);
  }
}

}  // namespace

const RowwiseKernels rowwise_kernels = {rms_norm<float>,
                                        rms_norm<uint16_t>,
                                        add_rms_norm<float>,
                                        add_rms_norm<uint16_t>,
                                        silu_and_mul,
                                        add_to,
                                        rotate,
                                        exponential};

}  // namespace fd::FD_ISA

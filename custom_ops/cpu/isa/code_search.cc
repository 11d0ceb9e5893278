// The nearest of 256 codewords, four rows of a column after another.
#include "../code_search_kernels.h"
#include "lanes.h"

namespace fd::FD_ISA {
namespace {

constexpr int kSteps = kCodewords / 16;

struct Found {
  int byte;
  float score;
};

// The codeword of the largest u.c - scale * half(c), the lowest byte among equals.
FD_INLINE Found best_codeword(const float* u, float scale, const float* book, const float* half) {
  const F16 u0 = splat(u[0]), u1 = splat(u[1]), u2 = splat(u[2]), u3 = splat(u[3]);
  const F16 minus_scale = splat(-scale);
  F16 scores[kSteps];
  F16 best[2] = {splat(-__builtin_inff()), splat(-__builtin_inff())};
  for (int i = 0; i < kSteps; ++i) {
    const float* c = book + 16 * i;
    F16 s = mul(minus_scale, load(half + 16 * i));
    s = fma(u0, load(c), s);
    s = fma(u1, load(c + kCodewords), s);
    s = fma(u2, load(c + 2 * kCodewords), s);
    scores[i] = fma(u3, load(c + 3 * kCodewords), s);
    best[i % 2] = max(scores[i], best[i % 2]);
  }
  const float top = reduce_max(max(best[0], best[1]));
  const F16 all = splat(top);
  for (int i = 0; i < kSteps; ++i) {
    const uint32_t equal = mask_equal(scores[i], all);
    if (equal) return {16 * i + __builtin_ctz(equal), top};
  }
  return {0, top};  // only NaN gets here; the caller has checked its input
}

// u = metric x, for a symmetric metric.
FD_INLINE void apply(const float* metric, const float* x, float* u) {
  for (int i = 0; i < kCodeRows; ++i) {
    float sum = 0.0f;
    for (int j = 0; j < kCodeRows; ++j) sum = __builtin_fmaf(metric[4 * j + i], x[j], sum);
    u[i] = sum;
  }
}

FD_INLINE float dot(const float* x, const float* y) {
  float sum = 0.0f;
  for (int i = 0; i < kCodeRows; ++i) sum = __builtin_fmaf(x[i], y[i], sum);
  return sum;
}

// target[rows] += sum over the block's four rows of change * feedback.
FD_INLINE void propagate(const float* change, const float* feedback, int64_t width, int64_t from,
                         float* target) {
  const F16 c0 = splat(change[0]), c1 = splat(change[1]), c2 = splat(change[2]),
            c3 = splat(change[3]);
  for (int64_t i = from / 16 * 16; i < width; i += 16) {
    const int left = width - i < 16 ? (int)(width - i) : 16;
    F16 t = load_first(target + i, left, 0.0f);
    t = fma(c0, load_first(feedback + i, left, 0.0f), t);
    t = fma(c1, load_first(feedback + width + i, left, 0.0f), t);
    t = fma(c2, load_first(feedback + 2 * width + i, left, 0.0f), t);
    t = fma(c3, load_first(feedback + 3 * width + i, left, 0.0f), t);
    store_first(target + i, t, left);
  }
}

void half_squares(const float* book, const float* metric, float* half) {
  for (int i = 0; i < kCodewords; i += 16) {
    F16 c[kCodeRows];
    for (int k = 0; k < kCodeRows; ++k) c[k] = load(book + k * kCodewords + i);
    F16 sum = splat(0.0f);
    for (int k = 0; k < kCodeRows; ++k) {
      F16 row = splat(0.0f);
      for (int j = 0; j < kCodeRows; ++j) row = fma(splat(metric[4 * k + j]), c[j], row);
      sum = fma(row, c[k], sum);
    }
    store(half + i, mul(sum, splat(0.5f)));
  }
}

float search_column(const CodeColumn& column) {
  const int64_t width = kCodeRows * column.blocks;
  float total = 0.0f;
  for (int64_t b = 0; b < column.blocks; ++b) {
    const int64_t row = kCodeRows * b;
    const float* metric = column.metric + 16 * b;
    const float* target = column.target + row;
    const float* weight = column.weight + row;
    float* error = column.error + row;
    float u[kCodeRows], change[kCodeRows];
    apply(metric, target, u);
    const Found found = best_codeword(u, column.scale, column.book, column.half + kCodewords * b);
    column.packed[b] = (uint8_t)found.byte;
    total += dot(target, u) - 2.0f * column.scale * found.score;
    if (column.before) {
      float old[kCodeRows], v[kCodeRows];
      for (int i = 0; i < kCodeRows; ++i) {
        old[i] = (target[i] - weight[i]) + column.before[row + i];
      }
      apply(metric, old, v);
      total -= dot(old, v);
    }
    for (int i = 0; i < kCodeRows; ++i) {
      const float value = column.scale * column.book[i * kCodewords + found.byte];
      error[i] = weight[i] - value;
      change[i] = column.before ? error[i] - column.before[row + i] : error[i];
    }
    if (column.feedback && row + kCodeRows < width) {
      propagate(change, column.feedback + row * width, width, row + kCodeRows, column.target);
    }
  }
  return total;
}

}  // namespace

const CodeSearchKernels code_search_kernels = {half_squares, search_column};

}  // namespace fd::FD_ISA

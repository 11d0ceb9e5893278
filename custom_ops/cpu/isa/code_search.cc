// The nearest of 256 codewords, four rows of a column after another.
#include "../code_search_kernels.h"
#include "lanes.h"

namespace fd::FD_ISA {
namespace {

constexpr int kSteps = kCodewords / 16;

// Trials that are searched side by side: they share the codewords that are read, and each covers
// the latency of the others. Two vectors a lane group leave AVX2 no registers for more than one.
#ifdef FD_LANES_512
constexpr int kTogether = 3;
#else
constexpr int kTogether = 1;
#endif

struct Found {
  int byte;
  float score;
};

// The first bit that is set in 16 masks of 16 bits, without a branch: which it is, nobody can
// guess.
FD_INLINE int first_bit(const uint32_t* masks) {
  int first = 0;
  for (int i = kSteps - 4; i >= 0; i -= 4) {
    const uint64_t low = (uint64_t)masks[i] | (uint64_t)masks[i + 1] << 16;
    const uint64_t high = (uint64_t)masks[i + 2] | (uint64_t)masks[i + 3] << 16;
    const uint64_t word = low | high << 32;
    first = word ? 16 * i + __builtin_ctzll(word) : first;
  }
  return first;
}

// For each of T trials, the codeword of the largest u.c - scale * half(c), the lowest byte among
// equals. Byte 0 if all are NaN; the caller has checked its input.
template <int T>
FD_INLINE void best_codewords(const float (*u)[kCodeRows], const CodeTrial* trials,
                              const float* book, const float* half, Found* found) {
  F16 v[T][kCodeRows], minus_scale[T], best[T][2], scores[T][kSteps];
  for (int t = 0; t < T; ++t) {
    for (int k = 0; k < kCodeRows; ++k) v[t][k] = splat(u[t][k]);
    minus_scale[t] = splat(-trials[t].scale);
    best[t][0] = best[t][1] = splat(-__builtin_inff());
  }
  for (int i = 0; i < kSteps; ++i) {
    const float* c = book + 16 * i;
    const F16 h = load(half + 16 * i), c0 = load(c), c1 = load(c + kCodewords),
              c2 = load(c + 2 * kCodewords), c3 = load(c + 3 * kCodewords);
    for (int t = 0; t < T; ++t) {
      F16 s = mul(minus_scale[t], h);
      s = fma(v[t][0], c0, s);
      s = fma(v[t][1], c1, s);
      s = fma(v[t][2], c2, s);
      s = fma(v[t][3], c3, s);
      scores[t][i] = s;
      best[t][i % 2] = max(s, best[t][i % 2]);
    }
  }
  for (int t = 0; t < T; ++t) {
    found[t].score = reduce_max(max(best[t][0], best[t][1]));
    const F16 top = splat(found[t].score);
    uint32_t equal[kSteps];
    for (int i = 0; i < kSteps; ++i) equal[i] = mask_equal(scores[t][i], top);
    found[t].byte = first_bit(equal);
  }
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

// What a block's choice does to one trial: byte, error, loss, and the targets of later blocks.
FD_INLINE void take(const CodeColumn& column, int64_t block, const float* u, Found found,
                    CodeTrial& trial) {
  const int64_t width = kCodeRows * column.blocks;
  const int64_t row = kCodeRows * block;
  const float* metric = column.metric + 16 * block;
  const float* target = trial.target + row;
  const float* weight = column.weight + row;
  float* error = trial.error + row;
  float change[kCodeRows];
  trial.packed[block] = (uint8_t)found.byte;
  trial.loss += dot(target, u) - 2.0f * trial.scale * found.score;
  if (column.before) {
    float old[kCodeRows], v[kCodeRows];
    for (int i = 0; i < kCodeRows; ++i) {
      old[i] = (target[i] - weight[i]) + column.before[row + i];
    }
    apply(metric, old, v);
    trial.loss -= dot(old, v);
  }
  for (int i = 0; i < kCodeRows; ++i) {
    const float value = trial.scale * column.book[i * kCodewords + found.byte];
    error[i] = weight[i] - value;
    change[i] = column.before ? error[i] - column.before[row + i] : error[i];
  }
  if (column.feedback && row + kCodeRows < width) {
    propagate(change, column.feedback + row * width, width, row + kCodeRows, trial.target);
  }
}

template <int T>
void search_together(const CodeColumn& column, CodeTrial* trials) {
  for (int t = 0; t < T; ++t) trials[t].loss = 0.0f;
  for (int64_t b = 0; b < column.blocks; ++b) {
    float u[T][kCodeRows];
    Found found[T];
    for (int t = 0; t < T; ++t) {
      apply(column.metric + 16 * b, trials[t].target + kCodeRows * b, u[t]);
    }
    best_codewords<T>(u, trials, column.book, column.half + kCodewords * b, found);
    for (int t = 0; t < T; ++t) take(column, b, u[t], found[t], trials[t]);
  }
}

void search_column(const CodeColumn& column, CodeTrial* trials, int64_t count) {
  int64_t at = 0;
  for (; at + kTogether <= count; at += kTogether) search_together<kTogether>(column, trials + at);
  for (; at < count; ++at) search_together<1>(column, trials + at);
}

}  // namespace

const CodeSearchKernels code_search_kernels = {half_squares, search_column};

}  // namespace fd::FD_ISA

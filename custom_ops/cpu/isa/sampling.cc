// Passes over one row of logits.
#include "../sampling_kernels.h"
#include "lanes.h"

namespace fd::FD_ISA {
namespace {

constexpr float kMinusInfinity = -__builtin_inff();

FD_INLINE F16 load_logits(const float* p, int64_t left) {
  return left >= 16 ? load(p) : load_first(p, left > 0 ? (int)left : 0, kMinusInfinity);
}

float scan(const float* logits, int64_t count, float* chunk_max, bool* has_nan) {
  uint32_t nan = 0;
  F16 best = splat(kMinusInfinity);
  for (int64_t i = 0; i < count; i += kChunkLogits) {
    F16 largest = splat(kMinusInfinity);
    for (int64_t k = i; k < i + kChunkLogits && k < count; k += 16) {
      const F16 x = load_logits(logits + k, count - k);
      nan |= mask_nan(x);
      largest = max(x, largest);
    }
    chunk_max[i / kChunkLogits] = reduce_max(largest);
    best = max(largest, best);
  }
  *has_nan = nan != 0;
  return reduce_max(best);
}

void chunk_weights(const float* logits, int64_t count, float max, uint64_t* weights) {
  const F16 shift = splat(max), unit = splat(kWeightUnit);
  for (int64_t i = 0; i < count; i += kChunkLogits) {
    U64Sum sum = no_sum();
    for (int64_t k = i; k < i + kChunkLogits && k < count; k += 16) {
      const F16 x = load_logits(logits + k, count - k);
      sum = add_fixed(sum, mul(exp16(sub(x, shift)), unit));
    }
    weights[i / kChunkLogits] = total(sum);
  }
}

int64_t rank(const float* logits, int64_t count, int64_t index) {
  const F16 own = splat(logits[index]);
  int64_t before = 0;
  for (int64_t i = 0; i < count; i += 16) {
    const F16 x = load_logits(logits + i, count - i);
    uint32_t found = mask_greater(x, own);
    if (i < index) {
      const uint32_t lower = index - i >= 16 ? 0xffffu : (1u << (index - i)) - 1;
      found |= mask_equal(x, own) & lower;
    }
    before += __builtin_popcount(found);
  }
  return before;
}

void penalise(float* logits, const int32_t* occurrences, int64_t count,
              const Penalties& penalties) {
  const float repetition = penalties.repetition;
  const float frequency = penalties.frequency;
  const float presence = penalties.presence;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t seen = occurrences[i];
    const int32_t times = seen & kCountMask;
    const float x = logits[i];
    const float repeated = x > 0.0f ? x / repetition : x * repetition;
    const float kept = seen != 0 ? repeated : x;
    const float lowered = kept - frequency * (float)times - presence;
    logits[i] = times > 0 ? lowered : kept;
  }
}

void scale(float* logits, int64_t count, float shift, float temperature) {
  for (int64_t i = 0; i < count; ++i) logits[i] = (logits[i] - shift) / temperature;
}

}  // namespace

const SamplingKernels sampling_kernels = {scan, chunk_weights, rank, penalise, scale};

}  // namespace fd::FD_ISA

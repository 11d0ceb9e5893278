// Kernels over one row of logits that each instruction set provides (cpu/isa/sampling.cc).
#pragma once

#include <cstdint>

#include "cpu_features.h"

namespace fd {

// Logits are summarised by the largest of every 64, so that later passes can skip most of a row.
constexpr int kChunkLogits = 64;

// Weights e^(logit - max) are summed as integers in units of 2^-44. Integer sums are exact: no
// order of summation, instruction set or selection algorithm can change a draw. A vocabulary below
// 2^20 cannot overflow 64 bits; what is rounded away weighs less than 2^-45 of the best token, per
// token.
constexpr float kWeightUnit = 17592186044416.0f;  // 2^44
constexpr int64_t kMaxVocabulary = int64_t{1} << 20;

struct Penalties {
  float repetition;
  float frequency;
  float presence;
};

// An entry of `occurrences`: times the token was generated, and whether the prompt has it.
constexpr int32_t kCountMask = (1 << 24) - 1;
constexpr int32_t kPromptBit = 1 << 30;

struct SamplingKernels {
  // Largest logit of every chunk of 64; returns the largest of all. *has_nan: whether one is NaN.
  float (*scan)(const float* logits, int64_t count, float* chunk_max, bool* has_nan);
  // Weight of every chunk of 64, in units of 2^-44. max must be finite.
  void (*chunk_weights)(const float* logits, int64_t count, float max, uint64_t* weights);
  // How many logits come before logits[index]: larger ones, and equal ones with a lower index.
  int64_t (*rank)(const float* logits, int64_t count, int64_t index);
  void (*penalise)(float* logits, const int32_t* occurrences, int64_t count,
                   const Penalties& penalties);
  // logits = (logits - shift) / temperature
  void (*scale)(float* logits, int64_t count, float shift, float temperature);
};

FD_DECLARE_KERNELS(SamplingKernels, sampling_kernels);

}  // namespace fd

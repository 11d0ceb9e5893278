// What happens to logits before a token is drawn, and their log-probabilities.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "logits_row.h"
#include "parallel.h"
#include "sampling.h"

namespace fd::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
// Below this temperature a quotient could overflow for the best logits: they are shifted to 0
// first.
constexpr float kTinyTemperature = 1e-3f;

[[noreturn]] void fail(const char* op, const char* name, int64_t index, const std::string& found,
                       const std::string& expected) {
  throw std::invalid_argument(std::string(op) + ": " + name + "[" + std::to_string(index) +
                              "] is " + found + ", expected " + expected);
}

void check_index(const char* op, const char* name, int64_t index, int64_t value, int64_t low,
                 int64_t end) {
  if (value >= low && value < end) return;
  fail(op, name, index, std::to_string(value),
       std::to_string(low) + " to " + std::to_string(end - 1));
}

int64_t rows_per_piece(const Logits& logits) {
  return std::max<int64_t>(1, 32768 / logits.vocabulary);
}

void mask_row(float* row, int64_t vocabulary, const int32_t* words) {
  for (int64_t begin = 0; begin < vocabulary; begin += 32) {
    const auto allowed = static_cast<uint32_t>(words[begin / 32]);
    if (allowed == ~uint32_t{0}) continue;
    const int64_t size = std::min<int64_t>(32, vocabulary - begin);
    if (allowed == 0) {  // most words, under a grammar
      std::fill_n(row + begin, size, -kInfinity);
      continue;
    }
    for (int64_t i = 0; i < size; ++i) {
      if (!(allowed >> i & 1)) row[begin + i] = -kInfinity;
    }
  }
}

void check(const ProcessArguments& a) {
  constexpr const char* kOp = "process_logits";
  for (int64_t r = 0; r < a.logits.rows; ++r) {
    if (a.occurrences) check_index(kOp, "slots", r, a.slots[r], 0, a.slot_count);
    const float t = a.temperature[r], n = a.repetition[r];
    if (!(t >= 0.0f && t < kInfinity)) {
      fail(kOp, "temperature", r, std::to_string(t), "0 or more");
    }
    if (!(n > 0.0f && n < kInfinity)) {
      fail(kOp, "repetition", r, std::to_string(n), "more than 0");
    }
    if (!std::isfinite(a.frequency[r]) || !std::isfinite(a.presence[r])) {
      fail(kOp, "frequency or presence", r, "not finite", "a number");
    }
    check_index(kOp, "edit_offsets", r + 1, a.edit_offsets[r + 1], a.edit_offsets[r], a.edits + 1);
  }
  check_index(kOp, "edit_offsets", 0, a.edit_offsets[0], 0, 1);
  for (int64_t i = 0; i < a.edits; ++i) {
    check_index(kOp, "edit_ids", i, a.edit_ids[i], 0, a.logits.vocabulary);
  }
}

void apply_edits(const ProcessArguments& a, int64_t r) {
  float* row = a.logits.row(r);
  for (int64_t i = a.edit_offsets[r]; i < a.edit_offsets[r + 1]; ++i) {
    float& logit = row[a.edit_ids[i]];
    const bool banned = logit == -kInfinity || a.edit_values[i] == -kInfinity;
    logit = banned ? -kInfinity : logit + a.edit_values[i];  // a ban beats an infinite bias
  }
}

void divide_by_temperature(float* row, int64_t count, float temperature,
                           const SamplingKernels& kernels) {
  if (temperature == 0.0f || temperature == 1.0f) return;
  float shift = 0.0f;
  if (temperature < kTinyTemperature) {
    const float max = *std::max_element(row, row + count);
    if (std::isfinite(max)) shift = max;
  }
  kernels.scale(row, count, shift, temperature);
}

void process_row(const ProcessArguments& a, int64_t r, const SamplingKernels& kernels) {
  float* row = a.logits.row(r);
  apply_edits(a, r);
  const Penalties penalties = {a.repetition[r], a.frequency[r], a.presence[r]};
  const bool penalised =
      penalties.repetition != 1.0f || penalties.frequency != 0.0f || penalties.presence != 0.0f;
  if (a.occurrences && penalised) {
    const int32_t* seen = a.occurrences + a.slots[r] * a.logits.vocabulary;
    kernels.penalise(row, seen, a.logits.vocabulary, penalties);
  }
  divide_by_temperature(row, a.logits.vocabulary, a.temperature[r], kernels);
}

// The natural logarithm of the sum of e^logit.
double log_sum_exp(LogitsRow& row) {
  return row.max() + std::log(static_cast<double>(row.total_weight()) / kWeightUnit);
}

// JSON has no infinity: what is impossible becomes float32's most negative number.
float logprob(float logit, double log_sum, double log_share) {
  if (logit == kInfinity) return static_cast<float>(log_share);
  const double value = static_cast<double>(logit) - log_sum;
  return static_cast<float>(std::max<double>(value, std::numeric_limits<float>::lowest()));
}

void row_logprobs(const LogprobArguments& a, int64_t r, LogitsRow& row,
                  const SamplingKernels& kernels) {
  const double log_sum = log_sum_exp(row);
  // Infinite logits share the whole probability equally.
  const double log_share = -std::log(static_cast<double>(row.total_weight()) / kWeightUnit);
  a.token_logprob[r] = logprob(row.data()[a.tokens[r]], log_sum, log_share);
  a.token_rank[r] = static_cast<int32_t>(1 + kernels.rank(row.data(), row.count(), a.tokens[r]));
  if (a.top == 0) return;
  row.collect(row.bound_of_best(a.top));
  std::vector<Candidate>& found = row.candidates();
  std::partial_sort(found.begin(), found.begin() + a.top, found.end());
  for (int64_t i = 0; i < a.top; ++i) {
    a.top_ids[r * a.top + i] = found[i].id;
    a.top_logprobs[r * a.top + i] = logprob(found[i].logit, log_sum, log_share);
  }
}

}  // namespace

void mask_logits(const MaskArguments& a) {
  for (int64_t r = 0; r < a.logits.rows; ++r) {
    check_index("mask_logits", "bitmask_rows", r, a.mask_rows[r], -1, a.masks);
  }
  parallel_for(a.logits.rows, rows_per_piece(a.logits), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      if (a.mask_rows[r] < 0) continue;
      mask_row(a.logits.row(r), a.logits.vocabulary, a.bitmask + a.mask_rows[r] * a.words);
    }
  });
}

void process_logits(const ProcessArguments& a) {
  check(a);
  const SamplingKernels& kernels = pick(sampling_kernels_tables);
  parallel_for(a.logits.rows, rows_per_piece(a.logits), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) process_row(a, r, kernels);
  });
}

void update_occurrences(const OccurrenceArguments& a) {
  constexpr const char* kOp = "update_occurrences";
  for (int64_t i = 0; i < a.count; ++i) {
    check_index(kOp, "slots", i, a.slots[i], 0, a.slot_count);
    check_index(kOp, "token_ids", i, a.tokens[i], 0, a.vocabulary);
  }
  for (int64_t i = 0; i < a.count; ++i) {
    int32_t& entry = a.occurrences[a.slots[i] * a.vocabulary + a.tokens[i]];
    if (a.prompt) {
      entry |= kPromptBit;
    } else if ((entry & kCountMask) != kCountMask) {
      ++entry;
    }
  }
}

void token_logprobs(const LogprobArguments& a) {
  for (int64_t r = 0; r < a.logits.rows; ++r) {
    check_index("token_logprobs", "tokens", r, a.tokens[r], 0, a.logits.vocabulary);
  }
  const SamplingKernels& kernels = pick(sampling_kernels_tables);
  std::vector<RowFault> faults(a.logits.rows, RowFault::kNone);
  parallel_for(a.logits.rows, rows_per_piece(a.logits), [&](int64_t begin, int64_t end) {
    LogitsRow row;
    for (int64_t r = begin; r < end; ++r) {
      faults[r] = row.open(a.logits.row(r), a.logits.vocabulary);
      if (faults[r] == RowFault::kNone) row_logprobs(a, r, row, kernels);
    }
  });
  raise_fault("token_logprobs", faults);
}

void best_logits(const BestArguments& a) {
  const SamplingKernels& kernels = pick(sampling_kernels_tables);
  const int64_t width = a.logits.vocabulary;
  parallel_for(a.logits.rows, rows_per_piece(a.logits), [&](int64_t begin, int64_t end) {
    LogitsRow row;
    std::vector<float> scaled;  // division can make different logits equal: it decides the order
    for (int64_t r = begin; r < end; ++r) {
      const float* own = a.logits.row(r);
      int32_t* ids = a.ids + r * a.count;
      float* values = a.values + r * a.count;
      scaled.assign(own, own + width);
      if (a.temperature[r] != 0.0f && a.temperature[r] != 1.0f) {
        kernels.scale(scaled.data(), width, 0.0f, a.temperature[r]);
      }
      if (row.open(scaled.data(), width) == RowFault::kNan) {
        std::iota(ids, ids + a.count, 0);
        std::fill_n(values, a.count, std::numeric_limits<float>::quiet_NaN());
        continue;
      }
      row.collect(row.bound_of_best(a.count));
      std::vector<Candidate>& found = row.candidates();
      std::partial_sort(found.begin(), found.begin() + a.count, found.end());
      for (int64_t i = 0; i < a.count; ++i) {
        ids[i] = found[i].id;
        values[i] = own[ids[i]];
      }
    }
  });
}

}  // namespace fd::cpu

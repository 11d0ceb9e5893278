// From logits to tokens (CPU). Logits are float32 [rows, vocabulary] with a stride between rows.
#pragma once

#include <cstdint>

namespace fd::cpu {

struct Logits {
  float* data;
  int64_t rows;
  int64_t vocabulary;
  int64_t stride;

  float* row(int64_t r) const { return data + r * stride; }
};

// Forbids (-inf) the tokens whose bit is 0 in row mask_rows[r] of bitmask; -1 = no mask.
struct MaskArguments {
  Logits logits;
  const int32_t* bitmask;  // [masks, words]
  int64_t masks;
  int64_t words;
  const int32_t* mask_rows;
};
void mask_logits(const MaskArguments& args);

struct ProcessArguments {
  Logits logits;
  const int32_t* slots;        // row of `occurrences`
  const int32_t* occurrences;  // [slot_count, vocabulary] or null: no penalties
  int64_t slot_count;
  const float* repetition;  // [rows], as the following
  const float* frequency;
  const float* presence;
  const float* temperature;
  const int32_t* edit_offsets;  // [rows + 1]
  const int32_t* edit_ids;      // [edits]
  const float* edit_values;
  int64_t edits;
};
// In this order: added edits, repetition, frequency and presence penalties, temperature.
void process_logits(const ProcessArguments& args);

struct OccurrenceArguments {
  int32_t* occurrences;  // [slot_count, vocabulary]
  int64_t slot_count;
  int64_t vocabulary;
  const int32_t* slots;
  const int32_t* tokens;
  int64_t count;
  bool prompt;
};
void update_occurrences(const OccurrenceArguments& args);

struct SampleArguments {
  Logits logits;
  const float* temperature;  // 0 = greedy; the logits are already divided by it
  const int32_t* top_k;
  const float* top_p;
  const float* min_p;
  const int64_t* seeds;
  const int64_t* steps;
  const int32_t* forced;
  int32_t* out;
};
// Throws std::invalid_argument naming the row whose logits are NaN or all -inf.
void sample(const SampleArguments& args);

struct LogprobArguments {
  Logits logits;
  const int32_t* tokens;
  int64_t top;
  float* token_logprob;  // [rows]
  int32_t* token_rank;
  int32_t* top_ids;  // [rows, top]
  float* top_logprobs;
};
void token_logprobs(const LogprobArguments& args);

struct BestArguments {
  Logits logits;
  const float* temperature;  // [rows]
  int64_t count;
  int32_t* ids;   // [rows, count]
  float* values;  // [rows, count]
};
// The logits of the best tokens by logit / temperature, ties by id, best first. A row with NaN
// gives NaN.
void best_logits(const BestArguments& args);

}  // namespace fd::cpu

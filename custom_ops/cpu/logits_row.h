// One row of logits with what its passes share: a thread's scratch, reused from row to row.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "rowwise_kernels.h"
#include "sampling_kernels.h"

namespace fd::cpu {

enum class RowFault : uint8_t { kNone, kNan, kNothingAllowed };

// Throws std::invalid_argument for the first row with a fault; `op` begins the message.
void raise_fault(const char* op, const std::vector<RowFault>& faults);

// A token that may be chosen. Candidates are ordered by logit, ties by id.
struct Candidate {
  float logit;
  int32_t id;
  uint64_t weight;  // e^(logit - max) in units of 2^-44

  bool operator<(const Candidate& other) const {  // "comes first"
    return logit > other.logit || (logit == other.logit && id < other.id);
  }
};

class LogitsRow {
 public:
  // Reads the row once. The pointer must stay valid while the object is used.
  RowFault open(const float* logits, int64_t count);

  int32_t argmax() const;
  // The sum of all weights in units of 2^-44; at least 2^44.
  uint64_t total_weight();
  // The token at which the running sum of weights, in order of ids, passes `point` <
  // total_weight().
  int32_t at_weight(uint64_t point) const;
  // A bound that at least `count` logits reach; -inf if that would take the whole row.
  float bound_of_best(int64_t count);
  // Fills candidates() with the tokens whose logit is at least `bound`, in order of ids.
  void collect(float bound);
  std::vector<Candidate>& candidates() { return candidates_; }
  // Sets the candidates' weights; drops those below `least`, a fraction of the best token's.
  void weigh(float least);

  float max() const { return max_; }
  int64_t count() const { return count_; }
  const float* data() const { return logits_; }

 private:
  bool infinite() const { return max_ == __builtin_inff(); }

  const RowwiseKernels& rowwise_ = pick(rowwise_kernels_tables);
  const SamplingKernels& kernels_ = pick(sampling_kernels_tables);
  const float* logits_ = nullptr;
  int64_t count_ = 0;
  float max_ = 0;
  std::vector<float> chunk_max_, sorted_max_, shifted_;
  std::vector<uint64_t> chunk_weight_;
  std::vector<Candidate> candidates_;
};

}  // namespace fd::cpu

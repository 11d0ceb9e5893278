#include "logits_row.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>
#include <stdexcept>

namespace fd::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Rounds to nearest even like the kernels' sums do: adding 2^52 leaves the integer in the mantissa.
uint64_t fixed_weight(float weight) {
  constexpr double kMagic = 4503599627370496.0;
  const double shifted = static_cast<double>(weight * kWeightUnit) + kMagic;
  uint64_t bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  return bits & ((uint64_t{1} << 52) - 1);
}

}  // namespace

void raise_fault(const char* op, const std::vector<RowFault>& faults) {
  for (size_t r = 0; r < faults.size(); ++r) {
    if (faults[r] == RowFault::kNone) continue;
    const char* what = faults[r] == RowFault::kNan ? "contains NaN" : "allows no token (all -inf)";
    throw std::invalid_argument(std::string(op) + ": row " + std::to_string(r) + " of logits " +
                                what);
  }
}

RowFault LogitsRow::open(const float* logits, int64_t count) {
  logits_ = logits;
  count_ = count;
  const int64_t chunks = (count + kChunkLogits - 1) / kChunkLogits;
  chunk_max_.resize(chunks);
  chunk_weight_.clear();
  bool has_nan = false;
  max_ = kernels_.scan(logits, count, chunk_max_.data(), &has_nan);
  if (has_nan) return RowFault::kNan;
  return max_ == -kInfinity ? RowFault::kNothingAllowed : RowFault::kNone;
}

int32_t LogitsRow::argmax() const {
  const auto chunk = std::find(chunk_max_.begin(), chunk_max_.end(), max_);
  const float* begin = logits_ + (chunk - chunk_max_.begin()) * kChunkLogits;
  return static_cast<int32_t>(std::find(begin, logits_ + count_, max_) - logits_);
}

uint64_t LogitsRow::total_weight() {
  if (infinite()) {  // the infinite logits share everything
    return std::count(logits_, logits_ + count_, kInfinity) * fixed_weight(1.0f);
  }
  if (chunk_weight_.empty()) {
    chunk_weight_.resize(chunk_max_.size());
    kernels_.chunk_weights(logits_, count_, max_, chunk_weight_.data());
  }
  return std::accumulate(chunk_weight_.begin(), chunk_weight_.end(), uint64_t{0});
}

int32_t LogitsRow::at_weight(uint64_t point) const {
  size_t chunk = 0;
  while (point >= chunk_weight_[chunk]) point -= chunk_weight_[chunk++];
  const int64_t begin = static_cast<int64_t>(chunk) * kChunkLogits;
  const int64_t size = std::min<int64_t>(kChunkLogits, count_ - begin);
  float weights[kChunkLogits];
  for (int64_t i = 0; i < size; ++i) weights[i] = logits_[begin + i] - max_;
  rowwise_.exponential(weights, size, weights);
  int64_t i = 0;
  for (; point >= fixed_weight(weights[i]); ++i) point -= fixed_weight(weights[i]);
  return static_cast<int32_t>(begin + i);
}

float LogitsRow::bound_of_best(int64_t count) {
  // Each of the `count` best chunks holds at least one logit as large as the worst of them.
  if (count > static_cast<int64_t>(chunk_max_.size())) return -kInfinity;
  sorted_max_ = chunk_max_;
  const auto bound = sorted_max_.begin() + (count - 1);
  std::nth_element(sorted_max_.begin(), bound, sorted_max_.end(), std::greater<float>());
  return *bound;
}

void LogitsRow::collect(float bound) {
  candidates_.clear();
  for (size_t chunk = 0; chunk < chunk_max_.size(); ++chunk) {
    if (chunk_max_[chunk] < bound) continue;
    const int64_t begin = static_cast<int64_t>(chunk) * kChunkLogits;
    const int64_t end = std::min<int64_t>(begin + kChunkLogits, count_);
    for (int64_t i = begin; i < end; ++i) {
      if (logits_[i] >= bound) candidates_.push_back({logits_[i], static_cast<int32_t>(i), 0});
    }
  }
}

void LogitsRow::weigh(float least) {
  shifted_.resize(candidates_.size());
  for (size_t i = 0; i < candidates_.size(); ++i) {
    const float logit = candidates_[i].logit;
    shifted_[i] = logit == max_ ? 0.0f : logit - max_;
  }
  rowwise_.exponential(shifted_.data(), static_cast<int64_t>(shifted_.size()), shifted_.data());
  size_t kept = 0;
  for (size_t i = 0; i < candidates_.size(); ++i) {
    if (shifted_[i] < least) continue;
    candidates_[i].weight = fixed_weight(shifted_[i]);
    candidates_[kept++] = candidates_[i];
  }
  candidates_.resize(kept);
}

}  // namespace fd::cpu

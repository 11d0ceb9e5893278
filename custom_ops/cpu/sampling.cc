#include "sampling.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "logits_row.h"
#include "parallel.h"
#include "philox.h"

namespace fd::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kGreedyTopP = 1e-5f;  // what FastDeploy turns top_p = 0 into

struct RowParameters {
  float temperature;
  int32_t top_k;
  float top_p;
  float min_p;
  int64_t seed;
  int64_t step;

  bool greedy() const { return temperature == 0.0f || top_k == 1 || top_p <= kGreedyTopP; }
};

[[noreturn]] void fail(const char* name, int64_t row, float value, const char* expected) {
  throw std::invalid_argument(std::string("sample: ") + name + "[" + std::to_string(row) + "] is " +
                              std::to_string(value) + ", expected " + expected);
}

void check(const SampleArguments& a) {
  for (int64_t r = 0; r < a.logits.rows; ++r) {
    if (!(a.temperature[r] >= 0.0f)) fail("temperature", r, a.temperature[r], "0 or more");
    if (!(a.top_p[r] >= 0.0f && a.top_p[r] <= 1.0f)) fail("top_p", r, a.top_p[r], "0 to 1");
    if (!(a.min_p[r] >= 0.0f && a.min_p[r] <= 1.0f)) fail("min_p", r, a.min_p[r], "0 to 1");
    if (a.forced[r] < -1 || a.forced[r] >= a.logits.vocabulary) {
      fail("forced", r, static_cast<float>(a.forced[r]), "-1 or a token of the vocabulary");
    }
  }
}

// ceil(fraction * total), exact: a float32 of at least 2^-17 is a multiple of 2^-41.
uint64_t fraction_of(float fraction, uint64_t total) {
  const auto numerator = static_cast<unsigned __int128>(std::ldexp(fraction, 41));
  const unsigned __int128 one = static_cast<unsigned __int128>(1) << 41;
  return static_cast<uint64_t>((numerator * total + one - 1) / one);
}

uint64_t scaled_uniform(const RowParameters& p, uint64_t total) {
  const auto product = static_cast<unsigned __int128>(uniform_bits(p.seed, p.step)) * total;
  return static_cast<uint64_t>(product >> 64);
}

uint64_t weight_of(const Candidate* begin, const Candidate* end) {
  uint64_t sum = 0;
  for (; begin != end; ++begin) sum += begin->weight;
  return sum;
}

class Sampler {
 public:
  RowFault run(const float* logits, int64_t count, const RowParameters& p, int32_t* token) {
    const RowFault fault = row_.open(logits, count);
    if (fault == RowFault::kNone) *token = p.greedy() ? row_.argmax() : draw(p);
    return fault;
  }

 private:
  int32_t draw(const RowParameters& p) {
    const bool limited = p.top_k > 0 && p.top_k < row_.count();
    if (!limited && p.min_p == 0.0f && p.top_p == 1.0f && row_.max() < kInfinity) {
      return row_.at_weight(scaled_uniform(p, row_.total_weight()));
    }
    gather(p, limited);
    const Candidate last = last_kept(p, limited);
    uint64_t total = 0;
    for (const Candidate& c : row_.candidates()) total += last < c ? 0 : c.weight;
    uint64_t point = scaled_uniform(p, total);
    for (const Candidate& c : row_.candidates()) {
      if (last < c) continue;
      if (point < c.weight) return c.id;
      point -= c.weight;
    }
    return last.id;  // not reached: point < total
  }

  // Candidates, with weights, that are sure to contain the tokens kept by the three limits.
  void gather(const RowParameters& p, bool limited) {
    float bound = limited ? row_.bound_of_best(p.top_k) : -kInfinity;
    if (p.min_p > 0.0f) {
      // A margin above the roundings of the logarithm and of this sum; weigh() decides exactly.
      const float margin = 1e-3f + 1e-6f * std::fabs(row_.max());
      bound = std::max(bound, row_.max() + std::log(p.min_p) - margin);
    }
    if (bound > -kInfinity || limited || row_.max() == kInfinity) {
      row_.collect(row_.max() == kInfinity ? kInfinity : bound);
      row_.weigh(p.min_p);
      return;
    }
    // Only top_p limits: widen until the tokens found weigh enough. Mostly the first reach does;
    // small steps keep flat rows from gathering the whole vocabulary.
    const uint64_t target = fraction_of(p.top_p, row_.total_weight());
    for (const float reach : {4.0f, 7.0f, 10.0f, 14.0f, kInfinity}) {
      row_.collect(row_.max() - reach);
      row_.weigh(0.0f);
      const std::vector<Candidate>& found = row_.candidates();
      if (weight_of(found.data(), found.data() + found.size()) >= target) return;
    }
  }

  // The last of the candidates, best first, that top_k and then top_p keep.
  Candidate last_kept(const RowParameters& p, bool limited) {
    pool_ = row_.candidates();
    auto end = pool_.end();
    if (limited && p.top_k < end - pool_.begin()) {
      std::nth_element(pool_.begin(), pool_.begin() + p.top_k, end);
      end = pool_.begin() + p.top_k;
    }
    if (p.top_p == 1.0f) return *std::max_element(pool_.begin(), end);
    Candidate *low = pool_.data(), *high = low + (end - pool_.begin());
    // When neither min_p nor top_k renormalised, the candidates may be a part of the whole weight.
    const bool whole = !limited && p.min_p == 0.0f && row_.max() < kInfinity;
    const uint64_t target =
        fraction_of(p.top_p, whole ? row_.total_weight() : weight_of(low, high));
    uint64_t before = 0;
    while (high - low > 1) {
      Candidate* middle = low + (high - low) / 2;
      std::nth_element(low, middle, high);
      const uint64_t reached = before + weight_of(low, middle);
      if (reached >= target) {
        high = middle;
      } else {
        before = reached;
        low = middle;
      }
    }
    return *low;
  }

  LogitsRow row_;
  std::vector<Candidate> pool_;
};

}  // namespace

void sample(const SampleArguments& a) {
  check(a);
  std::vector<RowFault> faults(a.logits.rows, RowFault::kNone);
  const int64_t grain = std::max<int64_t>(1, 32768 / a.logits.vocabulary);
  parallel_for(a.logits.rows, grain, [&](int64_t begin, int64_t end) {
    Sampler sampler;
    for (int64_t r = begin; r < end; ++r) {
      const RowParameters p = {a.temperature[r], a.top_k[r], a.top_p[r],
                               a.min_p[r],       a.seeds[r], a.steps[r]};
      if (a.forced[r] >= 0) {
        a.out[r] = a.forced[r];
      } else {
        faults[r] = sampler.run(a.logits.row(r), a.logits.vocabulary, p, a.out + r);
      }
    }
  });
  raise_fault("sample", faults);
}

}  // namespace fd::cpu

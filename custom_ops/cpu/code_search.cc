#include "code_search.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "code_search_kernels.h"
#include "parallel.h"

namespace fd::cpu {
namespace {

// Room of one thread: the state of every trial, so that the best one can be kept.
struct Scratch {
  Scratch(int64_t blocks, int64_t count)
      : target(kCodeRows * blocks * count),
        error(kCodeRows * blocks * count),
        packed(blocks * count),
        trials(count) {
    for (int64_t i = 0; i < count; ++i) {
      trials[i].target = target.data() + i * kCodeRows * blocks;
      trials[i].error = error.data() + i * kCodeRows * blocks;
      trials[i].packed = packed.data() + i * blocks;
    }
  }
  std::vector<float> target, error;
  std::vector<uint8_t> packed;
  std::vector<CodeTrial> trials;
};

void search_trials(const CodeSearch& s, const CodeSearchKernels& k, const float* half, int64_t n,
                   Scratch& scratch) {
  const int64_t rows = kCodeRows * s.blocks;
  CodeColumn column;
  column.blocks = s.blocks;
  column.book = s.books + static_cast<int64_t>(s.code[n]) * kCodeRows * kCodewords;
  column.half = half + static_cast<int64_t>(s.code[n]) * s.blocks * kCodewords;
  column.metric = s.metric;
  column.feedback = s.feedback;
  column.weight = s.weight + n * s.weight_stride;
  column.before = s.before ? s.before + n * rows : nullptr;
  for (int64_t i = 0; i < s.trials; ++i) {
    std::memcpy(scratch.trials[i].target, s.target + n * s.target_stride, sizeof(float) * rows);
    scratch.trials[i].scale = s.scales[n * s.trials + i];
  }
  k.search_column(column, scratch.trials.data(), s.trials);
  const auto best =
      std::min_element(scratch.trials.begin(), scratch.trials.end(),
                       [](const CodeTrial& a, const CodeTrial& b) { return a.loss < b.loss; });
  s.loss[n] = best->loss;
  s.choice[n] = static_cast<int32_t>(best - scratch.trials.begin());
  std::memcpy(s.error + n * rows, best->error, sizeof(float) * rows);
  std::memcpy(s.packed + n * s.blocks, best->packed, s.blocks);
}

void check_codes(const CodeSearch& s) {
  for (int64_t n = 0; n < s.columns; ++n) {
    if (s.code[n] < 0 || s.code[n] >= s.codes) {
      throw std::invalid_argument("code[" + std::to_string(n) + "] is " +
                                  std::to_string(s.code[n]) + ", expected 0 to " +
                                  std::to_string(s.codes - 1));
    }
  }
}

}  // namespace

void code_search(const CodeSearch& s) {
  check_codes(s);
  const CodeSearchKernels& k = pick(code_search_kernels_tables);
  std::vector<float> half(s.codes * s.blocks * kCodewords);
  parallel_for(s.codes * s.blocks, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      k.half_squares(s.books + i / s.blocks * kCodeRows * kCodewords,
                     s.metric + i % s.blocks * kCodeRows * kCodeRows, half.data() + i * kCodewords);
    }
  });
  // A column of 16 blocks takes about a microsecond a trial.
  const int64_t grain = std::max<int64_t>(1, 256 / (s.blocks * s.trials));
  parallel_for(s.columns, grain, [&](int64_t begin, int64_t end) {
    Scratch scratch(s.blocks, s.trials);
    for (int64_t n = begin; n < end; ++n) search_trials(s, k, half.data(), n, scratch);
  });
}

}  // namespace fd::cpu

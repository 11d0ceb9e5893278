// Which experts a token goes to.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "linear.h"
#include "linear_kernels.h"
#include "parallel.h"

namespace fd {
namespace {

constexpr int kMaxExperts = 1024;

// The `top_k` experts with the largest p + bias, ties to the lower id. With NaN everywhere the
// first ones: the ids stay valid and the NaN weights carry the news.
void select_experts(const float* p, const float* bias, int experts, int top_k, int32_t* ids,
                    float* weights) {
  bool taken[kMaxExperts] = {};
  for (int slot = 0; slot < top_k; ++slot) {
    int best = -1;
    float best_score = 0.0f;
    for (int e = 0; e < experts; ++e) {
      if (taken[e]) continue;
      const float score = bias ? p[e] + bias[e] : p[e];
      if (best < 0 || score > best_score) {
        best = e;
        best_score = score;
      }
    }
    taken[best] = true;
    ids[slot] = best;
  }
  float sum = 0.0f;
  for (int slot = 0; slot < top_k; ++slot) sum += p[ids[slot]];
  for (int slot = 0; slot < top_k; ++slot) weights[slot] = p[ids[slot]] / sum;
}

}  // namespace

void route(const TensorView& x, const TensorView& gate, const TensorView& bias,
           const TensorView& topk_ids, const TensorView& topk_weights) {
  x.check_rank("x", 2);
  gate.check_rank("gate_weight", 2).check_extent("gate_weight", 0, x.shape[1]);
  const int64_t tokens = x.shape[0], experts = gate.shape[1];
  topk_ids.check_rank("topk_ids", 2).check_extent("topk_ids", 0, tokens);
  const int64_t top_k = topk_ids.shape[1];
  topk_weights.check_rank("topk_weights", 2).check_extent("topk_weights", 0, tokens);
  topk_weights.check_extent("topk_weights", 1, top_k);
  if (experts > kMaxExperts || top_k < 1 || top_k > experts) {
    throw std::invalid_argument("top_k is " + std::to_string(top_k) + " of " +
                                std::to_string(experts) + " experts, expected 1 to the number of " +
                                "experts and at most " + std::to_string(kMaxExperts));
  }
  if (bias.data) bias.check_rank("bias", 1).check_extent("bias", 0, experts);
  const float* in = x.as<float>("x");
  const float* weight = gate.as<float>("gate_weight");
  const float* biases = bias.data ? bias.as<float>("bias") : nullptr;
  int32_t* ids = topk_ids.as<int32_t>("topk_ids");
  float* weights = topk_weights.as<float>("topk_weights");
  const LinearKernels& kernels = pick(linear_kernels_tables);
  const int64_t depth = x.shape[1];
  const int64_t grain = std::max<int64_t>(1, 200000 / (depth * experts));
  parallel_for(tokens, grain, [&](int64_t begin, int64_t end) {
    alignas(64) float p[kMaxExperts];
    for (int64_t t = begin; t < end; ++t) {
      kernels.gate_logits(in + t * x.strides[0], weight, depth, gate.strides[0],
                          static_cast<int>(experts), p);
      kernels.softmax(p, static_cast<int>(experts));
      select_experts(p, biases, static_cast<int>(experts), static_cast<int>(top_k),
                     ids + t * topk_ids.strides[0], weights + t * topk_weights.strides[0]);
    }
  });
}

}  // namespace fd

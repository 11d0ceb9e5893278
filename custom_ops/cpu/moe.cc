// Mixture of experts: routing, and the experts' SwiGLU MLPs over the tokens routed to them.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <vector>

#include "linear.h"
#include "parallel.h"
#include "rowwise_kernels.h"

namespace fd {
namespace {

// --- routing -------------------------------------------------------------------------------------

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

// --- experts -------------------------------------------------------------------------------------

// Tokens that are worked on at once: bounds the workspace; an expert's weights are decoded once for
// all of its tokens in a block.
constexpr int64_t kTokenBlock = 256;

// The (token, slot) pairs of a block of tokens, sorted by expert.
struct Assignment {
  std::vector<int32_t> experts;     // those with at least one pair
  std::vector<int64_t> first_pair;  // per such expert, and one past the last
  std::vector<int32_t> tokens;      // per pair
  std::vector<int32_t> positions;   // per (token, slot): which pair
};

Assignment assign(const int32_t* ids, int64_t stride, int64_t tokens, int64_t top_k,
                  int64_t experts) {
  std::vector<int64_t> next(experts + 1, 0);
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t s = 0; s < top_k; ++s) ++next[ids[t * stride + s] + 1];
  }
  Assignment result;
  for (int64_t e = 0; e < experts; ++e) {
    if (next[e + 1] > 0) {
      result.experts.push_back(static_cast<int32_t>(e));
      result.first_pair.push_back(next[e]);
    }
    next[e + 1] += next[e];
  }
  result.first_pair.push_back(tokens * top_k);
  result.tokens.resize(tokens * top_k);
  result.positions.resize(tokens * top_k);
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t s = 0; s < top_k; ++s) {
      const int64_t pair = next[ids[t * stride + s]]++;
      result.tokens[pair] = static_cast<int32_t>(t);
      result.positions[t * top_k + s] = static_cast<int32_t>(pair);
    }
  }
  return result;
}

// Addresses inside the workspace, for one block of tokens.
struct Buffers {
  float* hidden;   // [pairs][2 * Im]: gate and up; the gate half then takes the product
  float* outputs;  // [pairs][H]; until the down projection, the pairs' inputs lie here
  float* pair_x;   // [pairs][H] where up_gate is dense, else null
  int8_t* pair_digits;
  GroupNumbers* pair_groups;
  int8_t* token_digits;
  GroupNumbers* token_groups;
  int8_t* hidden_digits;
  GroupNumbers* hidden_groups;
  int64_t bytes;
};

Buffers lay_out(uint8_t* base, int64_t tokens, int64_t top_k, const PackedWeight& up_gate,
                const PackedWeight& down) {
  const int64_t pairs = tokens * top_k;
  int64_t used = 0;
  const auto take = [&](int64_t bytes) {
    uint8_t* begin = base + used;
    used += (bytes + 63) / 64 * 64;
    return begin;
  };
  Buffers b{};
  b.hidden = reinterpret_cast<float*>(take(pairs * up_gate.out_features * 4));
  const int64_t depth = up_gate.in_features, quantized_bytes = digit_bytes(pairs, depth);
  const int64_t input_bytes =
      up_gate.quantized() ? quantized_bytes + group_bytes(pairs, depth) : pairs * depth * 4;
  uint8_t* shared = take(std::max(pairs * down.out_features * 4, input_bytes));
  b.outputs = reinterpret_cast<float*>(shared);
  if (up_gate.quantized()) {
    b.pair_digits = reinterpret_cast<int8_t*>(shared);
    b.pair_groups = reinterpret_cast<GroupNumbers*>(shared + quantized_bytes);
    b.token_digits = reinterpret_cast<int8_t*>(take(digit_bytes(tokens, up_gate.in_features)));
    b.token_groups =
        reinterpret_cast<GroupNumbers*>(take(group_bytes(tokens, up_gate.in_features)));
  } else {
    b.pair_x = b.outputs;
  }
  if (down.quantized()) {
    b.hidden_digits = reinterpret_cast<int8_t*>(take(digit_bytes(pairs, down.in_features)));
    b.hidden_groups = reinterpret_cast<GroupNumbers*>(take(group_bytes(pairs, down.in_features)));
  }
  b.bytes = used;
  return b;
}

// One row a token becomes one row a pair, so that the rows of an expert follow one another. The
// copies are small beside the products (1 part in 70 of them for 256 tokens of 21B).
Rows gather_pairs(const PackedWeight& weight, const Assignment& assignment, const Rows& tokens,
                  const Buffers& b) {
  const int64_t depth = weight.in_features, pairs = assignment.tokens.size();
  parallel_for(pairs, std::max<int64_t>(1, 32768 / depth), [&](int64_t begin, int64_t end) {
    for (int64_t pair = begin; pair < end; ++pair) {
      const Rows row = skip_rows(weight, tokens, assignment.tokens[pair]);
      if (weight.quantized()) {
        std::memcpy(b.pair_digits + digit_bytes(pair, depth), row.digits, digit_bytes(1, depth));
        std::copy_n(row.groups, weight.groups(), b.pair_groups + pair * weight.groups());
      } else {
        std::copy_n(row.x, depth, b.pair_x + pair * depth);
      }
    }
  });
  return {b.pair_x, depth, b.pair_digits, b.pair_groups};
}

// All tiles of all experts that have pairs: the expert's pairs of `input` times its weights.
void multiply_experts(const PackedWeight& weight, const Assignment& assignment, const Rows& input,
                      float* out) {
  const int64_t tiles = weight.tiles(), active = assignment.experts.size();
  const int64_t pairs = assignment.tokens.size();
  const int64_t grain = tile_grain(weight, (pairs + active - 1) / active);
  parallel_for(active * tiles, grain, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end;) {
      const int64_t a = unit / tiles, first = assignment.first_pair[a];
      const int64_t count = assignment.first_pair[a + 1] - first;
      const int64_t tile = unit % tiles, stop = std::min(tiles, tile + end - unit);
      multiply_tiles(weight, assignment.experts[a], tile, stop, skip_rows(weight, input, first),
                     count, out + first * weight.out_features, weight.out_features);
      unit += stop - tile;
    }
  });
}

// SwiGLU in place: the gate half of each pair's row becomes silu(gate) * up.
void activate(const PackedWeight& up_gate, int64_t pairs, float* hidden) {
  const RowwiseKernels& kernels = pick(rowwise_kernels_tables);
  const int64_t row = up_gate.out_features, width = row / 2;
  parallel_for(pairs, std::max<int64_t>(1, 8192 / width), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      kernels.silu_and_mul(hidden + i * row, hidden + i * row + width, width, hidden + i * row);
    }
  });
}

void combine(const Assignment& assignment, const float* outputs, const TensorView& weights,
             int64_t first_token, const TensorView& out) {
  const LinearKernels& kernels = pick(linear_kernels_tables);
  const int64_t width = out.shape[1], top_k = weights.shape[1];
  const int64_t tokens = assignment.tokens.size() / top_k;
  const float* weight_rows = static_cast<const float*>(weights.data);
  float* out_rows = static_cast<float*>(out.data);
  const int64_t grain = std::max<int64_t>(1, 32768 / (width * top_k));
  parallel_for(tokens, grain, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      kernels.weighted_sum(outputs, width, assignment.positions.data() + t * top_k,
                           weight_rows + (first_token + t) * weights.strides[0],
                           static_cast<int>(top_k), width,
                           out_rows + (first_token + t) * out.strides[0]);
    }
  });
}

void moe_block(const TensorView& x, const TensorView& ids, const TensorView& weights,
               const PackedWeight& up_gate, const PackedWeight& down, const TensorView& out,
               uint8_t* memory, int64_t first_token, int64_t tokens) {
  const int64_t top_k = ids.shape[1], pairs = tokens * top_k;
  const Assignment assignment =
      assign(static_cast<const int32_t*>(ids.data) + first_token * ids.strides[0], ids.strides[0],
             tokens, top_k, up_gate.experts);
  const Buffers b = lay_out(memory, tokens, top_k, up_gate, down);
  const float* in = static_cast<const float*>(x.data) + first_token * x.strides[0];
  if (up_gate.quantized()) {
    quantize_rows(in, x.strides[0], tokens, up_gate.in_features, up_gate.offset(), b.token_digits,
                  b.token_groups);
  }
  const Rows token_rows{in, x.strides[0], b.token_digits, b.token_groups};
  multiply_experts(up_gate, assignment, gather_pairs(up_gate, assignment, token_rows, b), b.hidden);
  activate(up_gate, pairs, b.hidden);
  if (down.quantized()) {
    quantize_rows(b.hidden, up_gate.out_features, pairs, down.in_features, down.offset(),
                  b.hidden_digits, b.hidden_groups);
  }
  multiply_experts(down, assignment,
                   {b.hidden, up_gate.out_features, b.hidden_digits, b.hidden_groups}, b.outputs);
  combine(assignment, b.outputs, weights, first_token, out);
}

void check_ids(const TensorView& ids, int64_t experts) {
  const int32_t* values = ids.as<int32_t>("topk_ids");
  for (int64_t t = 0; t < ids.shape[0]; ++t) {
    for (int64_t s = 0; s < ids.shape[1]; ++s) {
      const int32_t id = values[t * ids.strides[0] + s];
      if (id < 0 || id >= experts) {
        throw std::invalid_argument("topk_ids[" + std::to_string(t) + ", " + std::to_string(s) +
                                    "] is " + std::to_string(id) + ", expected 0 to " +
                                    std::to_string(experts - 1));
      }
    }
  }
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

int64_t moe_workspace_bytes(int64_t tokens, int64_t top_k, const PackedWeight& up_gate,
                            const PackedWeight& down) {
  return lay_out(nullptr, std::min(tokens, kTokenBlock), top_k, up_gate, down).bytes;
}

void fused_moe(const TensorView& x, const TensorView& topk_ids, const TensorView& topk_weights,
               const PackedWeight& up_gate, const PackedWeight& down, const TensorView& out,
               const TensorView& workspace) {
  x.check_rank("x", 2).check_extent("x", 1, up_gate.in_features).as<float>("x");
  const int64_t tokens = x.shape[0];
  topk_ids.check_rank("topk_ids", 2).check_extent("topk_ids", 0, tokens);
  topk_weights.check_rank("topk_weights", 2).check_extent("topk_weights", 0, tokens);
  topk_weights.check_extent("topk_weights", 1, topk_ids.shape[1]).as<float>("topk_weights");
  out.check_rank("out", 2).check_extent("out", 0, tokens);
  out.check_extent("out", 1, down.out_features).as<float>("out");
  if (down.in_features * 2 != up_gate.out_features || down.experts != up_gate.experts) {
    throw std::invalid_argument("up_gate gives " + std::to_string(up_gate.out_features) +
                                " columns of " + std::to_string(up_gate.experts) +
                                " experts, down takes " + std::to_string(down.in_features) +
                                " of " + std::to_string(down.experts) +
                                ": expected twice as many of as many");
  }
  check_ids(topk_ids, up_gate.experts);
  workspace.check_contiguous("workspace");
  const int64_t needed = moe_workspace_bytes(tokens, topk_ids.shape[1], up_gate, down);
  if (workspace.size() * dtype_size(workspace.dtype) < needed) {
    throw std::invalid_argument("workspace is smaller than " + std::to_string(needed) + " bytes");
  }
  for (int64_t first = 0; first < tokens; first += kTokenBlock) {
    moe_block(x, topk_ids, topk_weights, up_gate, down, out, static_cast<uint8_t*>(workspace.data),
              first, std::min(kTokenBlock, tokens - first));
  }
}

}  // namespace fd

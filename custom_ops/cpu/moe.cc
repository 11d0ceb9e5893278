// Mixture of experts: SwiGLU MLPs over the tokens that are routed to them.
#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "bf16_rows.h"
#include "linear.h"
#include "parallel.h"
#include "rowwise_kernels.h"
#include "stretches.h"

namespace fd {
namespace {

// Tokens that are worked on at once: bounds the workspace; an expert's weights are decoded once for
// all of its tokens in a block.
constexpr int64_t kTokenBlock = 256;

// Columns that are summed before they are rounded.
constexpr int64_t kSumColumns = 512;

// The (token, slot) pairs of a block of tokens, sorted by expert.
struct Assignment {
  std::vector<int32_t> experts;     // those with at least one pair
  std::vector<int64_t> first_pair;  // per such expert, and one past the last
  std::vector<int32_t> tokens;      // per pair
  std::vector<int32_t> positions;   // per (token, slot): which pair

  int64_t pairs_of(int64_t active) const { return first_pair[active + 1] - first_pair[active]; }
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
  float* token_x;  // [tokens][H] where x is bfloat16 and comes to be needed as float32
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
  const int64_t depth = up_gate.in_features, quantized_bytes = digit_bytes(pairs, depth);
  const int64_t token_bytes = tokens * depth * 4, hidden_bytes = pairs * up_gate.out_features * 4;
  b.hidden = reinterpret_cast<float*>(take(std::max(hidden_bytes, token_bytes)));
  // Once their digits are made, quantised experts do not look at the rows any more.
  b.token_x = up_gate.quantized() ? b.hidden : reinterpret_cast<float*>(take(token_bytes));
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

// The tokens' rows as the up and gate projection takes them: float32, or digits of it.
Rows take_tokens(const TensorView& x, int64_t first_token, int64_t tokens,
                 const PackedWeight& up_gate, const Buffers& b) {
  const bool is_narrow = x.dtype == DType::kBFloat16;
  const int64_t depth = up_gate.in_features, offset = first_token * x.strides[0];
  const uint16_t* bits = static_cast<const uint16_t*>(x.data) + (is_narrow ? offset : 0);
  Rows rows{b.token_x, depth, b.token_digits, b.token_groups};
  if (!is_narrow) {
    rows.x = static_cast<const float*>(x.data) + offset;
    rows.x_stride = x.strides[0];
    if (!up_gate.quantized()) return rows;
  }
  parallel_stretches(tokens, depth, 2048, [&](int64_t token, int64_t first, int64_t end) {
    if (is_narrow) {
      const uint16_t* from = bits + token * x.strides[0];
      cpu::widen_row(from + first, end - first, b.token_x + token * depth + first);
    }
    if (up_gate.quantized()) {
      quantize_stretch(up_gate, rows.x + token * rows.x_stride, token, first, end, b.token_digits,
                       b.token_groups);
    }
  });
  return rows;
}

// The rows that the experts multiply. Those of an expert follow one another: where it has one, that
// is its token's, else a copy of each. (Copies are small beside the products: 1 part in 70 of them
// for 256 tokens of 21B.)
class PairRows {
 public:
  PairRows(const PackedWeight& weight, const Assignment& assignment, const Rows& tokens,
           const Buffers& b)
      : weight_(weight), assignment_(assignment), tokens_(tokens) {
    const int64_t depth = weight.in_features;
    copies_ = {b.pair_x, depth, b.pair_digits, b.pair_groups};
    std::vector<int64_t> pairs;
    for (size_t a = 0; a < assignment.experts.size(); ++a) {
      if (assignment.pairs_of(a) == 1) continue;
      for (int64_t p = assignment.first_pair[a]; p < assignment.first_pair[a + 1]; ++p) {
        pairs.push_back(p);
      }
    }
    parallel_for(pairs.size(), std::max<int64_t>(1, 32768 / depth),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t i = begin; i < end; ++i) copy(pairs[i], b);
                 });
  }

  // Those of the active expert `a`.
  Rows operator[](int64_t a) const {
    const int64_t first = assignment_.first_pair[a];
    if (assignment_.pairs_of(a) > 1) return skip_rows(weight_, copies_, first);
    return skip_rows(weight_, tokens_, assignment_.tokens[first]);
  }

 private:
  void copy(int64_t pair, const Buffers& b) const {
    const int64_t depth = weight_.in_features;
    const Rows row = skip_rows(weight_, tokens_, assignment_.tokens[pair]);
    if (weight_.quantized()) {
      std::memcpy(b.pair_digits + digit_bytes(pair, depth), row.digits, digit_bytes(1, depth));
      std::copy_n(row.groups, weight_.groups(), b.pair_groups + pair * weight_.groups());
    } else {
      std::copy_n(row.x, depth, b.pair_x + pair * depth);
    }
  }

  const PackedWeight& weight_;
  const Assignment& assignment_;
  const Rows tokens_;
  Rows copies_;
};

// All tiles of all experts that have pairs: input(a), the rows of the active expert `a`, times its
// weights.
template <typename Input>
void multiply_experts(const PackedWeight& weight, const Assignment& assignment, const Input& input,
                      float* out) {
  const int64_t tiles = weight.tiles(), active = assignment.experts.size();
  const int64_t pairs = assignment.tokens.size();
  const int64_t grain = tile_grain(weight, (pairs + active - 1) / active);
  parallel_for(active * tiles, grain, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end;) {
      const int64_t a = unit / tiles, first = assignment.first_pair[a];
      const int64_t tile = unit % tiles, stop = std::min(tiles, tile + end - unit);
      multiply_tiles(weight, assignment.experts[a], tile, stop, input(a), assignment.pairs_of(a),
                     out + first * weight.out_features, weight.out_features);
      unit += stop - tile;
    }
  });
}

// SwiGLU in place: the gate half of each pair's row becomes silu(gate) * up, and digits of it where
// the down projection takes those.
void activate(const PackedWeight& up_gate, const PackedWeight& down, int64_t pairs,
              const Buffers& b) {
  const RowwiseKernels& rowwise = pick(rowwise_kernels_tables);
  const int64_t row = up_gate.out_features, width = row / 2;
  parallel_stretches(pairs, width, 2048, [&](int64_t pair, int64_t first, int64_t end) {
    float* gate = b.hidden + pair * row;
    rowwise.silu_and_mul(gate + first, gate + width + first, end - first, gate + first);
    if (!down.quantized()) return;
    quantize_stretch(down, gate, pair, first, end, b.hidden_digits, b.hidden_groups);
  });
}

// Sums of the experts' outputs, in `out` as float32 or rounded to bfloat16.
void combine(const Assignment& assignment, const float* outputs, const TensorView& weights,
             int64_t first_token, const TensorView& out) {
  const LinearKernels& kernels = pick(linear_kernels_tables);
  const int64_t width = out.shape[1], top_k = weights.shape[1];
  const int64_t tokens = assignment.tokens.size() / top_k;
  const float* weight_rows = static_cast<const float*>(weights.data);
  const auto sum = [&](int64_t token, int64_t first, int64_t end, float* to) {
    kernels.weighted_sum(outputs + first, width, assignment.positions.data() + token * top_k,
                         weight_rows + (first_token + token) * weights.strides[0],
                         static_cast<int>(top_k), end - first, to);
  };
  // Most of the time goes into fetching what other threads have just written.
  const int64_t grain = 8192 / top_k;
  parallel_stretches(tokens, width, grain, [&](int64_t token, int64_t first, int64_t end) {
    const int64_t offset = (first_token + token) * out.strides[0];
    if (out.dtype != DType::kBFloat16) {
      return sum(token, first, end, static_cast<float*>(out.data) + offset + first);
    }
    alignas(64) float wide[kSumColumns];
    for (int64_t at = first; at < end; at += kSumColumns) {
      const int64_t stop = std::min(end, at + kSumColumns);
      sum(token, at, stop, wide);
      cpu::narrow_row(wide, stop - at, static_cast<uint16_t*>(out.data) + offset + at);
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
  const PairRows inputs(up_gate, assignment, take_tokens(x, first_token, tokens, up_gate, b), b);
  multiply_experts(up_gate, assignment, [&](int64_t a) { return inputs[a]; }, b.hidden);
  activate(up_gate, down, pairs, b);
  const Rows hidden{b.hidden, up_gate.out_features, b.hidden_digits, b.hidden_groups};
  const auto hidden_of = [&](int64_t a) {
    return skip_rows(down, hidden, assignment.first_pair[a]);
  };
  multiply_experts(down, assignment, hidden_of, b.outputs);
  combine(assignment, b.outputs, weights, first_token, out);
}

void check_activation(const char* name, const TensorView& view) {
  if (view.dtype != DType::kBFloat16) view.as<float>(name);
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

int64_t moe_workspace_bytes(int64_t tokens, int64_t top_k, const PackedWeight& up_gate,
                            const PackedWeight& down) {
  return lay_out(nullptr, std::min(tokens, kTokenBlock), top_k, up_gate, down).bytes;
}

void fused_moe(const TensorView& x, const TensorView& topk_ids, const TensorView& topk_weights,
               const PackedWeight& up_gate, const PackedWeight& down, const TensorView& out,
               const TensorView& workspace) {
  x.check_rank("x", 2).check_extent("x", 1, up_gate.in_features);
  check_activation("x", x);
  const int64_t tokens = x.shape[0];
  topk_ids.check_rank("topk_ids", 2).check_extent("topk_ids", 0, tokens);
  topk_weights.check_rank("topk_weights", 2).check_extent("topk_weights", 0, tokens);
  topk_weights.check_extent("topk_weights", 1, topk_ids.shape[1]).as<float>("topk_weights");
  out.check_rank("out", 2).check_extent("out", 0, tokens);
  out.check_extent("out", 1, down.out_features);
  check_activation("out", out);
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

#include "plan_attention.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "attention_shape.h"

namespace fd::cuda {
namespace {

int ceil_div(int a, int b) { return (a + b - 1) / b; }

}  // namespace

int most_segments(int width) {
  const int context = std::max(width, 1) * kBlockTokens;
  return std::min(ceil_div(context, 1 << kSegmentBits), 1 << kMaxSegmentsBits);
}

AttentionPlan plan_attention(const AttentionShape& shape, int multiprocessors,
                             int64_t partial_capacity) {
  const int segments = most_segments(shape.table_width);
  const int64_t floats =
      segments == 1 ? 0 : int64_t{shape.kv_heads} * segments * shape.group() * (shape.head_dim + 2);
  int64_t fit = kMaxListed;
  if (floats > 0) fit = std::min(fit, partial_capacity / floats);
  if (fit < 1) {
    throw std::runtime_error("paged_attention: one sequence needs " + std::to_string(4 * floats) +
                             " bytes of scratch memory, there are " +
                             std::to_string(4 * partial_capacity));
  }
  const int sequences = std::max(shape.sequences, 1);
  const int launches = ceil_div(sequences, static_cast<int>(fit));
  const int each = ceil_div(sequences, launches);
  const int blocks = static_cast<int>(
      std::min(int64_t{each} * shape.kv_heads * segments, int64_t{multiprocessors}));
  return {each, blocks, each * floats};
}

bool decodes(const AttentionShape& shape) { return shape.group() <= kRows; }

bool takes_chunks(const AttentionShape& shape) {
  return shape.tokens > shape.sequences || !decodes(shape);
}

bool chunks_on_wgmma(const AttentionShape& shape, const CardFacts& card) {
  return shape.head_dim == 128 && card.major == 9;
}

bool decodes_in_one(const AttentionShape& shape, const AttentionPlan& plan) {
  const int64_t segments =
      int64_t{shape.sequences} * shape.kv_heads * most_segments(shape.table_width);
  return shape.tokens == shape.sequences && decodes(shape) && segments <= plan.blocks;
}

bool merges_apart(int sequences, int kv_heads, int segments, int blocks) {
  const int64_t heads = int64_t{sequences} * kv_heads;
  return heads * segments > blocks || heads > kMostTickets;
}

}  // namespace fd::cuda

#include "plan.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "stream_shape.h"
#include "tiles_shape.h"

namespace fd::cuda {
namespace {

constexpr int kPlainTile = 32;
constexpr int kLongCopy = 2;  // chunks: 4 KB reach the bandwidth that 2 KB miss by a sixth
constexpr int kMostStages = 4;

/// Most tokens for which the persistent kernel is the faster one, by measurement; see
/// docs/performance.md. At most twice kStreamGroup, of which shared memory often holds fewer.
constexpr int kStreamTokens = 16;

int padded(int k) { return (k + kStreamChunkK - 1) / kStreamChunkK * kStreamChunkK; }

/// Rows of x that a block holds at once: all tokens, then the slots of two groups.
int stream_row_bytes(const ExpertsShape& s) {
  const int slots = s.tokens * s.top_k;
  const int inner_rows = std::min(slots, 2 * std::min(s.tokens, kStreamGroup));
  return std::max(s.tokens * (2 * padded(s.hidden) + kStreamRowGap),
                  inner_rows * (2 * padded(s.inner) + kStreamRowGap));
}

/// Fills the ring's shape; false where the call does not fit.
bool plan_stream(const ExpertsShape& s, const CardFacts& card, ExpertsPlan& plan) {
  const int slots = s.tokens * s.top_k;
  if (card.major < 9 || s.chunk_bytes == 0 || s.tokens > kStreamRows || slots > kStreamSlots ||
      slots > card.multiprocessors) {
    return false;
  }
  plan.row_bytes = stream_row_bytes(s);
  const int left = card.shared_bytes - kStreamFixedBytes - plan.row_bytes;
  for (plan.copy_chunks = kLongCopy; plan.copy_chunks > 0; --plan.copy_chunks) {
    plan.stages = std::min(kMostStages, left / (kStreamWarps * (plan.copy_chunks * s.chunk_bytes)));
    if (plan.stages >= 2) return true;
  }
  plan.copy_chunks = plan.stages = 1;
  return left >= kStreamWarps * s.chunk_bytes;
}

/// Most rows of a tile of Hopper's, by the rows that experts have on average. Where they have less
/// than a kernel's most by half (for few rows) or a third, the few experts that need more take two
/// tiles: a launch for them alone would leave most of the card idle.
int hopper_tile(const ExpertsShape& s) {
  const int64_t slots = int64_t{s.tokens} * s.top_k;
  if (2 * slots <= int64_t{kMostLowRows} * s.experts) return kMostLowRows;
  if (3 * slots <= 2 * int64_t{kMostShortRows} * s.experts) return kMostShortRows;
  return kMostTallRows;
}

}  // namespace

ExpertsPlan plan_experts(const ExpertsShape& shape, const CardFacts& card, int forced) {
  ExpertsPlan plan{};
  const bool streams = plan_stream(shape, card, plan);
  const bool wgmma = card.major == 9;
  plan.path = streams && shape.tokens <= kStreamTokens ? ExpertsPath::kStream
              : wgmma                                  ? ExpertsPath::kTiles
                                                       : ExpertsPath::kPlain;
  if (forced >= 0) plan.path = static_cast<ExpertsPath>(forced);
  if ((plan.path == ExpertsPath::kStream && !streams) ||
      (plan.path == ExpertsPath::kTiles && !wgmma) || forced > 2) {
    throw std::invalid_argument("experts: path " + std::to_string(forced) + " cannot serve " +
                                std::to_string(shape.tokens) + " tokens on this card");
  }
  plan.tile_tokens = plan.path == ExpertsPath::kTiles ? hopper_tile(shape) : kPlainTile;
  const int slots = shape.tokens * shape.top_k;
  plan.max_tiles = slots / plan.tile_tokens + std::min(shape.experts, slots);
  return plan;
}

}  // namespace fd::cuda

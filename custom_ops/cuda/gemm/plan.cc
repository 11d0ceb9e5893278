#include "plan.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "plan_cards.h"
#include "stream_shape.h"
#include "tiles_shape.h"

namespace fd::cuda {
namespace {

constexpr int kPlainTile = 32;

/// Fills the sizes; false where the call does not fit.
bool plan_stream(const ExpertsShape& s, const CardFacts& card, bool digits, ExpertsPlan& plan) {
  if (digits && !s.ccq) return false;
  const int slots = s.tokens * s.top_k, group = std::min(s.tokens, kStreamGroup);
  if (card.major < 9 || s.chunk_bytes == 0 || slots > kStreamSlots ||
      slots > card.multiprocessors * kStreamWarps || std::max(s.hidden, s.inner) > kStreamWidest) {
    return false;
  }
  // a run of digits may cost nearly twice as much as another group's chunks, and may cross into one
  // other group alone
  const int groups = std::min(slots, s.experts * ((s.tokens + group - 1) / std::max(group, 1)));
  if (digits && 2 * groups > card.multiprocessors * kStreamWarps) return false;
  const int widest = std::max(s.hidden, s.inner);
  const int row = digits ? digit_row_bytes(widest) : stream_row_bytes(widest);
  // a block has a part of one group or of two, unless there are more groups than blocks
  const int rows = slots <= card.multiprocessors ? std::min(slots, 2 * group) : kStreamRows;
  plan.row_bytes = group * row;
  plan.room_bytes = std::min(card.shared_bytes - kStreamFixedBytes,
                             rows * row + stream_ring_bytes(s.chunk_bytes));
  return plan.room_bytes - plan.row_bytes >= kStreamWarps * s.chunk_bytes;
}

/// Whether it is also the fastest. With more tokens than a product has columns, a block may have to
/// hold two full groups of rows beside two slots of a ring for every warp; 2-bit weights, which are
/// bound by instructions, bear shorter rings.
bool streams_best(const ExpertsShape& s, const CardFacts& card, const ExpertsPlan& plan) {
  if (s.tokens <= kStreamGroup) return true;
  return s.tokens <= card_table(card.major).stream_tokens &&
         (s.chunk_bytes < kStreamCopyBytes ||
          plan.room_bytes >= 2 * plan.row_bytes + 2 * kStreamWarps * s.chunk_bytes);
}

/// Most rows of a tile of Hopper's, by the rows that experts have on average. Where they have less
/// than a kernel's most by half (for few rows) or a third, the few experts that need more take two
/// tiles: a launch for them alone would leave most of the card idle.
int hopper_tile(const ExpertsShape& s) {
  const int64_t slots = int64_t{s.tokens} * s.top_k;
  if (2 * slots <= int64_t{kMostLowRows} * s.experts) return kMostLowRows;
  if (5 * slots <= 4 * int64_t{kMostShortRows} * s.experts) return kMostShortRows;
  return kMostTallRows;
}

/// Whether a path can serve the call; fills the sizes of a persistent launch.
bool fits(ExpertsPath path, const ExpertsShape& s, const CardFacts& card, ExpertsPlan& plan) {
  if (streams(path)) return plan_stream(s, card, path == ExpertsPath::kDigits, plan);
  return path == ExpertsPath::kPlain || (path == ExpertsPath::kTiles && card.major == 9);
}

/// Whether digits serve all calls that are small enough for them: among those a token's bits may
/// not depend on how many others there are. What serves the largest one serves any.
bool digits_serve_all(ExpertsShape s, const CardFacts& card) {
  ExpertsPlan plan{};
  s.tokens = card_table(card.major).stream_tokens;
  return fits(ExpertsPath::kDigits, s, card, plan) && streams_best(s, card, plan);
}

/// The fastest one, as measured.
ExpertsPath best_path(const ExpertsShape& s, const CardFacts& card, ExpertsPlan& plan) {
  for (const ExpertsPath path : {ExpertsPath::kDigits, ExpertsPath::kStream}) {
    if (path == ExpertsPath::kDigits && (s.same_bits || !digits_serve_all(s, card))) continue;
    if (fits(path, s, card, plan) && streams_best(s, card, plan)) return path;
  }
  return card.major == 9 ? ExpertsPath::kTiles : ExpertsPath::kPlain;
}

}  // namespace

ExpertsPlan plan_experts(const ExpertsShape& shape, const CardFacts& card, int forced) {
  ExpertsPlan plan{};
  plan.path = forced < 0 ? best_path(shape, card, plan) : static_cast<ExpertsPath>(forced);
  if (!fits(plan.path, shape, card, plan)) {
    throw std::invalid_argument("experts: path " + std::to_string(forced) + " cannot serve " +
                                std::to_string(shape.tokens) + " tokens on this card");
  }
  plan.tile_tokens = plan.path == ExpertsPath::kTiles ? hopper_tile(shape) : kPlainTile;
  const int slots = shape.tokens * shape.top_k;
  plan.max_tiles = slots / plan.tile_tokens + std::min(shape.experts, slots);
  return plan;
}

}  // namespace fd::cuda

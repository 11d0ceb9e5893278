#include "plan.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "stream_shape.h"
#include "tiles_shape.h"

namespace fd::cuda {
namespace {

constexpr int kPlainTile = 32;

/// Most tokens for which the persistent kernel is the faster one, by measurement; see
/// docs/performance.md.
constexpr int kStreamTokens = 16;

/// Fills the sizes; false where the call does not fit.
bool plan_stream(const ExpertsShape& s, const CardFacts& card, ExpertsPlan& plan) {
  const int slots = s.tokens * s.top_k, group = std::min(s.tokens, kStreamGroup);
  if (card.major < 9 || s.chunk_bytes == 0 || slots > kStreamSlots ||
      slots > card.multiprocessors * kStreamWarps || std::max(s.hidden, s.inner) > kStreamWidest) {
    return false;
  }
  const int row = stream_row_bytes(std::max(s.hidden, s.inner));
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
bool streams_best(const ExpertsShape& s, const ExpertsPlan& plan) {
  if (s.tokens <= kStreamGroup) return true;
  return s.tokens <= kStreamTokens &&
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

// -- Hopper's linear kernel --------------------------------------------------------------------

constexpr int kUsualRows = 128;  // of a tile, where higher ones leave more blocks idle
constexpr int kRowsBeside = 64;  // rows' worth of time that a k tile of an item takes beside
constexpr int kItemTiles = 3;    // k tiles' worth of time that an item takes beside them
constexpr int kFinishTiles = 4;  // and that a launch to add up parts takes,
constexpr int64_t kPartialOfTile = 4 << 20;  // beside one for so many bytes of them

int ceil_div(int a, int b) { return (a + b - 1) / b; }

int groups_of(const LinearShape& s) { return ceil_div(s.columns, kHopperColumns); }

/// Rows in tiles of equal height, at most `most`.
LinearPlan cut_rows(const LinearShape& s, int most) {
  const int wanted = ceil_div(s.rows, most), height = ceil_div(ceil_div(s.rows, wanted), 8) * 8;
  return {height, ceil_div(s.rows, height), 1};
}

/// Time for the rows of K, up to a factor: a tile takes that of its kernel's height, see
/// launch_hopper().
int64_t rows_time(const LinearShape& s, const LinearPlan& plan, int multiprocessors) {
  const int computed = plan.height > kUsualRows ? kHopperRows : ceil_div(plan.height, 32) * 32;
  return int64_t{ceil_div(plan.tiles * groups_of(s), multiprocessors)} * (computed + kRowsBeside);
}

/// Time in k tiles, where the parts of K are cut into so many runs.
int64_t runs_time(const LinearShape& s, const LinearPlan& plan, int runs, int multiprocessors) {
  const int rounds = ceil_div(plan.tiles * groups_of(s) * runs, multiprocessors);
  const int64_t own = int64_t{rounds} * (ceil_div(s.k_tiles, runs) + kItemTiles);
  const int64_t bytes = int64_t{8} * s.parts * s.rows * s.columns;  // written and read
  return runs == 1 ? own : own + kFinishTiles + bytes / kPartialOfTile;
}

}  // namespace

LinearPlan plan_linear(const LinearShape& s, int64_t partial_floats, int multiprocessors) {
  LinearPlan plan = cut_rows(s, kHopperRows);
  const LinearPlan usual = cut_rows(s, kUsualRows);
  if (rows_time(s, usual, multiprocessors) < rows_time(s, plan, multiprocessors)) plan = usual;
  if (int64_t{s.parts} * s.rows * s.columns > partial_floats) return plan;
  for (int runs = 2; runs <= s.parts; runs *= 2) {
    if (runs_time(s, plan, runs, multiprocessors) <
        runs_time(s, plan, plan.runs, multiprocessors)) {
      plan.runs = runs;
    }
  }
  return plan;
}

ExpertsPlan plan_experts(const ExpertsShape& shape, const CardFacts& card, int forced) {
  ExpertsPlan plan{};
  const bool streams = plan_stream(shape, card, plan);
  const bool wgmma = card.major == 9;
  plan.path = streams && streams_best(shape, plan) ? ExpertsPath::kStream
              : wgmma                              ? ExpertsPath::kTiles
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

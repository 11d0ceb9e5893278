#include "plan_linear.h"

#include <initializer_list>

#include "plan_cards.h"

namespace fd::cuda {
namespace {

int ceil_div(int a, int b) { return (a + b - 1) / b; }

// -- rows of a tile ------------------------------------------------------------------------------

constexpr int kTallRows = 128;

int64_t elements(const LinearCall& call) { return int64_t{call.in_features} * call.out_features; }

bool suits_hopper(const LinearCall& call, const CardFacts& card) {
  const CardTable& table = card_table(card.major);
  const bool large = call.kind == Kind::kInt8 && elements(call) >= table.large_weight;
  return call.rows > (large ? table.large_mma_rows : table.mma_rows) && hopper_serves(call, card);
}

/// Three blocks for two multiprocessors fill a card.
bool fills_in_tall_tiles(const LinearCall& call, const CardFacts& card) {
  const int blocks = ceil_div(call.rows, kTallRows) * ceil_div(call.out_features, kWideColumns);
  return 2 * blocks >= 3 * card.multiprocessors;
}

// -- parts of K ----------------------------------------------------------------------------------

constexpr int kSkinnyOverhead = 3;  // k tiles' worth of time beside a warp's loop
constexpr int kBusyBlocks = 2;      // blocks an SM needs to hide its latencies
constexpr int kAddingTiles = 2;     // k tiles' worth of time that adding parts takes

/// Rounds of a multiprocessor with so many blocks, in blocks.
int64_t rounds_of(int64_t blocks, int resident) {
  const int64_t rest = blocks % resident;
  return blocks - rest + (rest > 0 && rest < kBusyBlocks ? kBusyBlocks : rest);
}

// -- Hopper's kernel -----------------------------------------------------------------------------

constexpr int kUsualRows = 128;  // of a tile, where higher ones leave more blocks idle
constexpr int kRowsBeside = 64;  // rows' worth of time that a k tile of an item takes beside
constexpr int kItemTiles = 3;    // k tiles' worth of time that an item takes beside them
constexpr int kFinishTiles = 4;  // and that a launch to add up parts takes,
constexpr int64_t kPartialOfTile = 4 << 20;  // beside one for so many bytes of them

int groups_of(const LinearShape& s) { return ceil_div(s.columns, kHopperColumns); }

/// Rows in tiles of equal height, at most `most`.
HopperCut cut_rows(const LinearShape& s, int most) {
  const int wanted = ceil_div(s.rows, most), height = ceil_div(ceil_div(s.rows, wanted), 8) * 8;
  return {height, ceil_div(s.rows, height), 1};
}

/// Time for the rows of K, up to a factor.
int64_t rows_time(const LinearShape& s, const HopperCut& cut, int multiprocessors) {
  return int64_t{ceil_div(cut.tiles * groups_of(s), multiprocessors)} *
         (hopper_kernel_rows(cut.height) + kRowsBeside);
}

/// Time in k tiles, where the parts of K are cut into so many runs.
int64_t runs_time(const LinearShape& s, const HopperCut& cut, int runs, int multiprocessors) {
  const int rounds = ceil_div(cut.tiles * groups_of(s) * runs, multiprocessors);
  const int64_t own = int64_t{rounds} * (ceil_div(s.k_tiles, runs) + kItemTiles);
  const int64_t bytes = int64_t{8} * s.parts * s.rows * s.columns;  // written and read
  return runs == 1 ? own : own + kFinishTiles + bytes / kPartialOfTile;
}

}  // namespace

bool hopper_serves(const LinearCall& call, const CardFacts& card) {
  return (call.kind == Kind::kInt8 || call.kind == Kind::kInt4) && card.major == 9 &&
         call.scratch_floats * 2 / kHopperRows >=
             int64_t{ceil_div(call.in_features, kTileRows)} * kTileRows;
}

int linear_tile(const LinearCall& call, const CardFacts& card, int forced) {
  if (forced != 0) return forced;
  if (suits_hopper(call, card)) return kHopperTile;
  const bool small = elements(call) <= card_table(card.major).small_weight;
  // the whole batch while it is few rows, but half of it where the weight has to fill the card
  for (const int rows : {8, 16, 32, 64}) {
    if (call.rows <= rows) return small && rows > 16 ? rows / 2 : rows;
  }
  return fills_in_tall_tiles(call, card) && !is_ccq(call.kind) ? kTallRows : 64;
}

int canonical_parts(const ProductShape& s, int multiprocessors) {
  const int blocks = s.gated ? s.n_tiles / 2 : s.n_tiles, resident = resident_blocks(s.gated, 1);
  int best = 1;
  int64_t least = INT64_MAX;
  for (int parts = 1; parts <= kSkinnyWarps && parts <= s.k_tiles; parts *= 2) {
    const int64_t total = int64_t{ceil_div(blocks * parts, kSkinnyWarps)} * s.tiles_of_token;
    const int64_t busiest = (total + multiprocessors - 1) / multiprocessors;
    const int64_t time =
        rounds_of(busiest, resident) * (ceil_div(s.k_tiles, parts) + kSkinnyOverhead);
    if (time < least) {
      least = time;
      best = parts;
    }
  }
  return best;
}

bool splits_parts(const LinearShape& s, int blocks, int64_t partial_floats, int multiprocessors) {
  if (s.parts == 1 || int64_t{s.parts} * s.rows * s.columns > partial_floats) return false;
  auto time = [&](int split) {
    return ceil_div(blocks * split, kBusyBlocks * multiprocessors) *
           (ceil_div(s.k_tiles, split) + kSkinnyOverhead);
  };
  return time(s.parts) + kAddingTiles < time(1);
}

int hopper_rows(int rows, int k_tiles, int64_t scratch_floats) {
  const int64_t room = scratch_floats * 2 / (int64_t{k_tiles} * kTileRows);
  if (room >= rows) return rows;
  return static_cast<int>(room / kHopperRows * kHopperRows);
}

HopperCut hopper_cut(const LinearShape& s, int64_t partial_floats, int multiprocessors) {
  HopperCut cut = cut_rows(s, kHopperRows);
  const HopperCut usual = cut_rows(s, kUsualRows);
  if (rows_time(s, usual, multiprocessors) < rows_time(s, cut, multiprocessors)) cut = usual;
  if (int64_t{s.parts} * s.rows * s.columns > partial_floats) return cut;
  for (int runs = 2; runs <= s.parts; runs *= 2) {
    if (runs_time(s, cut, runs, multiprocessors) < runs_time(s, cut, cut.runs, multiprocessors)) {
      cut.runs = runs;
    }
  }
  return cut;
}

}  // namespace fd::cuda

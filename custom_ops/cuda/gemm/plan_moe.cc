#include "plan_moe.h"

#include <algorithm>
#include <initializer_list>

#include "plan_cards.h"
#include "route_shape.h"

namespace fd::cuda {
namespace {

int ceil_div(int a, int b) { return (a + b - 1) / b; }

/// Tiles of so many rows serve experts that have at most so many on average.
struct TileOfMean {
  int rows;
  int most_mean;
};
constexpr TileOfMean kTileOfMean[] = {{8, 6}, {16, 12}, {32, 32}};
constexpr int kTallRows = 64;

int tile_rows(const DenseExpertsShape& s, int major) {
  // up to so few tokens experts hardly ever coincide
  if (s.tokens <= card_table(major).direct_tokens) return 0;
  const int64_t slots = int64_t{s.tokens} * s.top_k;
  for (const TileOfMean& tile : kTileOfMean) {
    if (s.tokens <= tile.rows || slots <= int64_t{tile.most_mean} * s.experts) return tile.rows;
  }
  return kTallRows;
}

}  // namespace

RoutePlan route_plan(int tokens, int hidden, int experts, int multiprocessors) {
  const int pieces = ceil_div(hidden, kPieceRows);
  const int64_t blocks = int64_t{ceil_div(tokens, kRouteTokens)} * ceil_div(experts, kRouteExperts);
  RoutePlan plan{pieces, 1};
  for (const int run : {1, kGroupPieces}) {
    // four blocks an SM hide each other's latencies; more would only add partial sums
    if (blocks * ceil_div(pieces, run) <= 4 * multiprocessors) {
      plan = {run, ceil_div(pieces, run)};
      break;
    }
  }
  return plan;
}

DenseExpertsPlan plan_dense_experts(const DenseExpertsShape& s, int major, int forced) {
  const int slots = s.tokens * s.top_k, rows = forced >= 0 ? forced : tile_rows(s, major);
  return {rows, rows == 0 ? slots : slots / rows + std::min(s.experts, slots)};
}

}  // namespace fd::cuda

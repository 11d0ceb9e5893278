#include "plan_moe.h"

#include <algorithm>
#include <initializer_list>

#include "plan_cards.h"
#include "route_shape.h"

namespace fd::cuda {
namespace {

int ceil_div(int a, int b) { return (a + b - 1) / b; }

constexpr int kTallRows = 64;

int tile_rows(const DenseExpertsShape& s, int major) {
  const CardTable& table = card_table(major);
  if (s.tokens <= table.direct_tokens) return 0;  // experts hardly ever coincide
  const int64_t slots = int64_t{s.tokens} * s.top_k;
  int rows = 8;
  for (const int mean : table.tile_means) {
    if (s.tokens <= rows || slots <= int64_t{mean} * s.experts) return rows;
    rows *= 2;
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

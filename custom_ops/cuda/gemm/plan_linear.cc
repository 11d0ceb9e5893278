#include "plan_linear.h"

namespace fd::cuda {
namespace {

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

}  // namespace fd::cuda

// How a MoE layer's router and its bf16 experts are spread; plan.h does so for quantised experts.
// Host code without CUDA.
#pragma once

#include <cstdint>

namespace fd::cuda {

/// How the router's products are spread: blocks sum `run` pieces of 64 rows each and leave `count`
/// partial sums. Chosen for speed alone, results are the same bits for every plan.
struct RoutePlan {
  int run;
  int count;
};
RoutePlan route_plan(int tokens, int hidden, int experts, int multiprocessors);

/// A call of bf16 experts.
struct DenseExpertsShape {
  int tokens;
  int top_k;
  int experts;
};

struct DenseExpertsPlan {
  int tile_rows;  // of sorted slots; 0: every slot is a tile of its own, nothing is sorted
  int max_tiles;
};

/// An expert has at most `tokens` rows, on average tokens * top_k / experts: a tile holds those of
/// most experts, so that their weights are read once.
///
/// `major`: of the compute capability. `forced`: tile_rows, or -1 for the fastest as measured.
/// Speed alone depends on it.
DenseExpertsPlan plan_dense_experts(const DenseExpertsShape& shape, int major, int forced);

}  // namespace fd::cuda

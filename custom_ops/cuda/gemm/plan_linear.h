// How Hopper's kernel cuts a linear map. Host code without CUDA, as plan.h.
#pragma once

#include <cstdint>

namespace fd::cuda {

constexpr int kHopperRows = 160;     // most rows of a tile of Hopper's linear kernel
constexpr int kHopperColumns = 128;  // of an item of it

/// Sizes of a product: of x, of the output, and of K in k tiles and in parts, a power of two.
struct LinearShape {
  int rows;
  int columns;
  int k_tiles;
  int parts;
};

struct LinearPlan {
  int height;  // of a tile of rows, whole eights
  int tiles;   // of rows; the last one may be lower
  int runs;    // of equal numbers of parts of K: blocks share them where there are more than one
};

/// `partial_floats`: room for the sums of parts. Speed alone depends on the plan.
LinearPlan plan_linear(const LinearShape& shape, int64_t partial_floats, int multiprocessors);

}  // namespace fd::cuda

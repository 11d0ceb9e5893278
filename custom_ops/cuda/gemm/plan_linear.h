// Which kernel serves a linear map with a tiled weight, in tiles of how many rows, and how K is cut
// and shared out. Host code without CUDA, as plan.h.
#pragma once

#include <cstdint>

#include "../weight_kind.h"
#include "linear_shape.h"
#include "plan.h"

namespace fd::cuda {

struct LinearCall {
  int rows;  // of x
  Kind kind;
  int in_features;
  int out_features;
  int64_t scratch_floats;  // room for sums of parts of K, and for x in Hopper's order
};

/// Whether the card has Hopper's kernel for such a weight and the scratch room for a tile of it.
bool hopper_serves(const LinearCall& call, const CardFacts& card);

/// Rows of a tile: 8 or 16 of the kernel that streams weights, 32, 64 or 128 of the one that works
/// in tiles, or kHopperTile. `forced`: one of these, or 0 for the fastest as measured. Speed alone
/// depends on it.
int linear_tile(const LinearCall& call, const CardFacts& card, int forced);

/// What a product with a tiled weight is, whatever the step.
struct ProductShape {
  int n_tiles;
  int k_tiles;
  bool gated;          // silu(x Wg) * (x Wu): column blocks are gate and up in turn
  int tiles_of_token;  // top_k experts, or 1
};

/// Parts into which K is cut: as many warps share one column block when a single token decodes,
/// chosen for the least time of the busiest SM: its blocks run in rounds of those resident, and a
/// round of few blocks takes as long as one of two, which hide each other's latencies.
///
/// Part of what a product is (see gemm_rows.cuh), unlike all else here: it may depend on the
/// weight, the card and the tiles of one token, but on nothing of a step.
int canonical_parts(const ProductShape& product, int multiprocessors);

/// Sizes of a product: of x, of the output, and of K in k tiles and in parts, a power of two.
struct LinearShape {
  int rows;
  int columns;
  int k_tiles;
  int parts;
};

/// Whether the parts of K go to blocks of their own, where there are too few row tiles and columns
/// (`blocks`) to fill the card. The sums are the same. `partial_floats`: room for those of parts.
bool splits_parts(const LinearShape& shape, int blocks, int64_t partial_floats,
                  int multiprocessors);

/// Rows, of so many, that scratch holds in Hopper's order at once: all, or whole tiles.
int hopper_rows(int rows, int k_tiles, int64_t scratch_floats);

/// How Hopper's kernel cuts a product.
struct HopperCut {
  int height;  // of a tile of rows, whole eights
  int tiles;   // of rows; the last one may be lower
  int runs;    // of equal numbers of parts of K: blocks share them where there are more than one
};

/// `partial_floats`: room for the sums of parts. Speed alone depends on the cut.
HopperCut hopper_cut(const LinearShape& shape, int64_t partial_floats, int multiprocessors);

}  // namespace fd::cuda

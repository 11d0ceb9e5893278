// Sizes of the kernels of linear maps that their plan has to know.
#pragma once

namespace fd::cuda {

constexpr int kSkinnyWarps = 8;

/// Blocks of the streaming kernel that fit on an SM, as its launch bounds ask for.
constexpr int resident_blocks(bool gated, int token_tiles) {
  return token_tiles == 1 && !gated ? 3 : 2;
}

/// First k tile of part `part` of K; that of part `parts` is the end. Every kernel of a product
/// with a tiled weight cuts K here, so that all add the same products in the same order.
constexpr int part_begin(int k_tiles, int part, int parts) { return k_tiles * part / parts; }

constexpr int kWideColumns = 128;    // of a block of the tile kernel
constexpr int kHopperRows = 160;     // most rows of a tile of Hopper's kernel
constexpr int kHopperColumns = 128;  // of an item of it

/// Rows that the kernel for tiles of this height computes: there is one for each of few heights.
constexpr int hopper_kernel_rows(int height) {
  return height > 128 ? kHopperRows : (height + 31) / 32 * 32;
}

constexpr int kHopperTile = 256;  // stands for Hopper's kernel, which cuts rows by itself

}  // namespace fd::cuda

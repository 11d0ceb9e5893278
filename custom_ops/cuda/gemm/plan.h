// Which kernel serves a call of the experts, and how: decided here and nowhere else, as the files
// plan_*.h beside this one decide for the other products. Host code without CUDA, so that it can be
// tested on any machine.
#pragma once

#include <cstdint>

namespace fd::cuda {

enum class ExpertsPath : int {
  kStream = 0,  // one persistent launch; weights through rings of bulk copies, mma.sync
  kTiles = 1,   // rows sorted by expert, wgmma
  kPlain = 2,   // rows sorted by expert, mma.sync, any card
  kDigits = 3   // kStream in integers, for 2 bits: other bits than all of those above
};

/// Whether a path is the one persistent launch.
constexpr bool streams(ExpertsPath path) {
  return path == ExpertsPath::kStream || path == ExpertsPath::kDigits;
}

struct CardFacts {
  int major;
  int multiprocessors;
  int shared_bytes;  // the most that one block may have
};

struct ExpertsShape {
  int tokens;
  int top_k;
  int experts;
  int hidden;
  int inner;
  int chunk_bytes;  // of 512 rows of 16 columns; 0: the two weights are coded differently
  bool ccq;         // both weights are coded in 2 bits
  bool same_bits;   // a token's bits may not depend on which path serves it
};

struct ExpertsPlan {
  ExpertsPath path;
  int tile_tokens;  // kTiles, kPlain: most rows of a tile
  int max_tiles;
  int room_bytes;  // of a persistent launch: shared memory of a block for rings and rows of x
  int row_bytes;   // and of the rows of the largest possible group of an expert's slots
};

/// `forced`: an ExpertsPath, or -1 for the fastest as measured. All but kDigits give the same bits.
///
/// Throws std::invalid_argument where the forced path cannot serve the call.
ExpertsPlan plan_experts(const ExpertsShape& shape, const CardFacts& card, int forced);

}  // namespace fd::cuda

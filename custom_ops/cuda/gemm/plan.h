// Which kernel serves a call of the experts, and how: decided here and nowhere else, as the files
// plan_*.h beside this one decide for the other products. Host code without CUDA, so that it can be
// tested on any machine.
#pragma once

#include <cstdint>

namespace fd::cuda {

enum class ExpertsPath : int {
  kStream = 0,  // one persistent launch; weights through rings of bulk copies, mma.sync
  kTiles = 1,   // rows sorted by expert, wgmma
  kPlain = 2    // rows sorted by expert, mma.sync, any card
};

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
};

struct ExpertsPlan {
  ExpertsPath path;
  int tile_tokens;  // kTiles, kPlain: most rows of a tile
  int max_tiles;
  int room_bytes;  // kStream: shared memory of a block for rings and rows of x
  int row_bytes;   // kStream: the rows of the largest possible group of an expert's slots
};

/// `forced`: an ExpertsPath, or -1 for the fastest as measured. Speed alone depends on it.
///
/// Throws std::invalid_argument where the forced path cannot serve the call.
ExpertsPlan plan_experts(const ExpertsShape& shape, const CardFacts& card, int forced);

}  // namespace fd::cuda

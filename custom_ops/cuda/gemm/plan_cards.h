// Where one kernel becomes faster than another, on each architecture: the numbers that the plans
// beside this file read. A further architecture is a further row in plan_cards.cc.
#pragma once

#include <cstdint>

namespace fd::cuda {

/// Thresholds of one architecture. Speed alone depends on them: the kernels between which they
/// decide give a row the same bits, but for the digits of few 2-bit tokens (see plan.h).
struct CardTable {
  int major;  // compute capability from which on this row counts
  /// Chosen by timing cards of this architecture, see docs/performance.md; otherwise taken over
  /// from the row that was.
  bool measured;
  int64_t small_weight;  // elements of one that takes more blocks than tall tiles give
  int64_t large_weight;  // elements of one of int8 that is worth wgmma sooner
  int mma_rows;          // most rows of a linear map that mma.sync serves where there is wgmma
  int large_mma_rows;    // of one with a large weight
  int direct_tokens;     // most tokens whose slots read bf16 experts one by one, unsorted
  int stream_tokens;     // most tokens whose quantised experts take one persistent launch
  int tile_means[3];     // most rows of a bf16 expert on average for tiles of 8, 16 and 32
};

/// The row of a card: the last one that counts.
const CardTable& card_table(int major);

}  // namespace fd::cuda

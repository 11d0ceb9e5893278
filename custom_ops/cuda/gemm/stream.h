// The persistent kernel for few tokens: its argument and launch.
#pragma once

#include "experts.h"
#include "stream_shape.h"

namespace fd::cuda {

/// Memory of all blocks together. Counts and handed sums are zero between launches.
struct StreamState {
  unsigned* passed;        // blocks that have taken their rows of the first product's results
  unsigned* ready;         // [kStreamSlots] finished blocks of columns of it, of each group
  unsigned* columns;       // [kStreamBlocks] groups that have finished a block of columns of out
  uint4* sums;             // [2][warps of the grid][kStreamHanded][32] from a warp to the next one
  __nv_bfloat16* inner;    // [slots][I]
  __nv_bfloat16* outputs;  // [H / 16][slots][16]
};

struct StreamJob {
  ExpertsCall call;
  StreamState state;
  int room_bytes;  // shared memory of a block for rings and rows of x
  bool digits;     // integer products, which CCQ alone has
};

void launch_stream(const StreamJob& job, int multiprocessors, cudaStream_t stream);

}  // namespace fd::cuda

// The persistent kernel for few tokens: its argument and launch.
#pragma once

#include "experts.h"
#include "stream_shape.h"

namespace fd::cuda {

/// Memory of all blocks together. Counters and flags are zero between launches.
struct StreamState {
  unsigned* barrier;       // {arrived, generation}
  unsigned* flags;         // [2][warps of the grid]
  float4* sums;            // [2][warps of the grid][32]
  __nv_bfloat16* inner;    // [slots][I]
  __nv_bfloat16* outputs;  // [slots][H]
};

struct StreamJob {
  ExpertsCall call;
  StreamState state;
  int stages;
  int copy_chunks;
  int row_bytes;  // shared memory for rows of x
};

int stream_shared_bytes(const ExpertsCall& call, int stages, int copy_chunks, int row_bytes);
void launch_stream(const StreamJob& job, int multiprocessors, cudaStream_t stream);

}  // namespace fd::cuda

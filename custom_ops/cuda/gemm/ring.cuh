// Rings of buffers that barriers guard.
#pragma once

#include "../ptx/barrier.cuh"

namespace fd::cuda {

#if defined(__CUDACC__) && (!defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900)

/// A ring's place and the parity of its phase, for one user of it.
struct RingPlace {
  int slot = 0;
  uint32_t parity = 0;

  __device__ void next(int slots) {
    if (++slot == slots) {
      slot = 0;
      parity ^= 1;
    }
  }
};

/// All lanes of a warp are done with what the barrier guards. `arrivals`: 1, lane 0 for all of
/// them, whose accesses __syncwarp() puts before its own arrival; or 32, each lane for itself. Both
/// are right, but compute-sanitizer's racecheck credits an arrival with the accesses of its own
/// lane alone, and calls those of the other 31 a race (docs/performance.md); 32 takes up to 2 %
/// longer.
__device__ __forceinline__ void warp_arrive(uint32_t barrier, int arrivals) {
  __syncwarp();
  if (static_cast<int>(threadIdx.x % 32) < arrivals) barrier_arrive(barrier);
}

#endif

}  // namespace fd::cuda

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

#endif

}  // namespace fd::cuda

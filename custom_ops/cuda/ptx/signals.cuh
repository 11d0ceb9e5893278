// What kernels, and blocks of one, tell each other through global memory, and in which order others
// see it.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fd::cuda {

#ifdef __CUDACC__

/// Waits for what the kernels ahead have written, then lets the next one take its place. Every
/// thread that reads or writes global memory other than weights calls it first; loads of others'
/// results must not be __ldg, which the compiler may move ahead of it.
__device__ __forceinline__ void wait_for_inputs() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/// For words that are messages themselves: each of the four is seen once it is there, in any order.
__device__ __forceinline__ void store_relaxed(uint4* to, const uint32_t (&v)[4]) {
  asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(to), "r"(v[0]), "r"(v[1]),
               "r"(v[2]), "r"(v[3])
               : "memory");
}

__device__ __forceinline__ void load_relaxed(const uint4* from, uint32_t (&v)[4]) {
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "l"(from)
               : "memory");
}

/// What others wrote before an add_release() that this sees is there.
__device__ __forceinline__ unsigned load_acquire(const unsigned* from) {
  unsigned v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(from) : "memory");
  return v;
}

__device__ __forceinline__ void add_release(unsigned* to, int count) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(to), "r"(count) : "memory");
}

/// Counts to `last`, then from 0 again; what it was. Both a release and an acquire.
__device__ __forceinline__ unsigned increment(unsigned* to, unsigned last) {
  unsigned before;
  asm volatile("atom.inc.acq_rel.gpu.global.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(to), "r"(last)
               : "memory");
  return before;
}

#endif  // __CUDACC__

}  // namespace fd::cuda

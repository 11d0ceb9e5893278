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

// -- between cards -------------------------------------------------------------------------------

/// What this thread, and those it has met at a barrier, wrote before is there for whoever sees it.
__device__ __forceinline__ void store_release_system(unsigned* to, unsigned value) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
}

__device__ __forceinline__ unsigned load_acquire_system(const unsigned* from) {
  unsigned v;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(from) : "memory");
  return v;
}

/// For pairs of a word and its mark: each of the two is seen as a whole, in any order.
__device__ __forceinline__ void store_pairs_system(ulonglong2* to, uint64_t first,
                                                   uint64_t second) {
  asm volatile("st.relaxed.sys.global.v2.u64 [%0], {%1,%2};" ::"l"(to), "l"(first), "l"(second)
               : "memory");
}

__device__ __forceinline__ void load_pairs_system(const ulonglong2* from, uint64_t (&v)[2]) {
  asm volatile("ld.relaxed.sys.global.v2.u64 {%0,%1}, [%2];"
               : "=l"(v[0]), "=l"(v[1])
               : "l"(from)
               : "memory");
}

#endif  // __CUDACC__

}  // namespace fd::cuda

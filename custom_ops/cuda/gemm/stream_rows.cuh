// Rows of bf16 to shared memory as float16, for the persistent kernel (stream.cuh).
#pragma once

#include "canonical.cuh"
#include "stream_shape.h"

namespace fd::cuda::stream {

constexpr int kThreads = kStreamWarps * kWarp;
constexpr int kHeld = 8;  // 16-byte vectors of rows that a thread converts at once
static_assert(kStreamWidest <= kHeld * kThreads * 8);

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

/// Some rows of bf16 on their way to shared memory: a thread holds `of_row` vectors of each.
struct Rows {
  uint4 v[kHeld];
  int of_row, at_once;

  __device__ explicit Rows(int padded)
      : of_row((padded / 8 + kThreads - 1) / kThreads), at_once(kHeld / of_row) {}

  /// Calls f(index, row, vector) for each vector of rows first .. first + at_once - 1 below count.
  template <typename F>
  __device__ __forceinline__ void each(int first, int count, int vectors, F f) {
    int row = first, part = 0;
#pragma unroll
    for (int u = 0; u < kHeld; ++u) {
      const int i = threadIdx.x + part * kThreads;
      if (row < min(count, first + at_once)) f(u, row, i < vectors ? i : -1);
      if (++part == of_row) part = 0, ++row;
    }
  }

  /// `source`: a row's first vector.
  template <typename Source>
  __device__ __forceinline__ void load(int first, int count, int width, Source source) {
    each(first, count, width / 8, [&](int u, int row, int i) {
      v[u] = i >= 0 ? __ldcg(source(row) + i) : make_uint4(0, 0, 0, 0);
    });
  }

  __device__ __forceinline__ void find_tops(int first, int count, int width, unsigned* tops) {
    each(first, count, width / 8, [&](int u, int row, int) {
      unsigned top = 0;  // of either half: bits of magnitudes are in their order
#pragma unroll
      for (int i = 0; i < 4; ++i) top = __vmaxu2(top, word_of(v[u], i) & 0x7fff7fffu);
      top = __reduce_max_sync(kFullMask, max(top << 16, top & 0xffff0000u));
      if (threadIdx.x % kWarp == 0) atomicMax(&tops[row], top);
    });
  }

  __device__ __forceinline__ void store(int first, int count, int padded, const unsigned* tops,
                                        uint32_t to, int stride) {
    each(first, count, padded / 8, [&](int u, int row, int i) {
      const uint4 slots = to_slots(v[u], row_scale(__uint_as_float(tops[row])));
      if (i < 0) return;
      store_shared(to + row * stride + i * 16, slots);
    });
  }
};

#endif

}  // namespace fd::cuda::stream

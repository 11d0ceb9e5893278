// The persistent kernel's products in float16 (stream.cuh): those of canonical.cuh, the same bits
// as every other kernel of an expert.
#pragma once

#include <type_traits>

#include "canonical.cuh"
#include "stream_rows.cuh"

namespace fd::cuda::stream {

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

/// A block of columns for the rows of a group: one chain of m16n8k16 steps.
template <Coding kCoding>
struct HalfSums {
  static constexpr int kFloats = 4, kTokens = 2;
  float v[kFloats];
  uint32_t x;  // this lane's row of x at the next chunk

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kFloats; ++i) v[i] = 0.0f;
  }

  /// Looks at chunk `chunk` of K. `row(token)`: where a token of the group lies in shared memory.
  template <typename Row>
  __device__ __forceinline__ void look_at(int chunk, int, Row row) {
    const int lane = threadIdx.x % kWarp;
    x = row(lane / 4) + lane % 4 * 16 + chunk * (kChunkK * 2);
  }

  /// 512 rows of K, which lie at `chunk` in shared memory.
  template <typename Code>
  __device__ __forceinline__ void add_chunk(uint32_t chunk, const Code& code,
                                            const Registers& held) {
    const int lane = threadIdx.x % kWarp, g = lane / 4;
    const uint32_t tiles = chunk + scale_bytes(kCoding) + lane * 16;
    if constexpr (std::is_same_v<Code, LaneCode<false>>) {
      add_half(chunk + g * 8, tiles, x, code, held);
      add_half(chunk + g * 8 + 4, tiles + 2 * tile_size(kCoding), x + 512, code, held);
    } else {
      // seldom run: half the code to fetch
#pragma unroll 1
      for (int half = 0; half < 2; ++half) {
        add_half(chunk + g * 8 + 4 * half, tiles + half * 2 * tile_size(kCoding), x + half * 512,
                 code, held);
      }
    }
    x += kChunkK * 2;
  }

  /// Sum of the group's token `2c + i` in column g, or g + 8; `unit`: what it counts.
  __device__ __forceinline__ float value(int i, int column) const { return v[2 * column + i]; }
  __device__ static int token(int i) { return 2 * (threadIdx.x % 4) + i; }
  __device__ __forceinline__ void finish() {}

 private:
  /// Two tiles; `scales`: of this lane's columns.
  template <typename Code>
  __device__ __forceinline__ void add_half(uint32_t scales, uint32_t tiles, uint32_t from,
                                           const Code& code, const Registers& held) {
    uint32_t pairs = 0;
    if constexpr (kCoding == Coding::kCcq) pairs = load_shared_word(scales);
    add_tile<0>(tiles, from, pairs, code, held);
    add_tile<1>(tiles, from, pairs, code, held);
  }

  template <int kTile, typename Code>
  __device__ __forceinline__ void add_tile(uint32_t tiles, uint32_t from, uint32_t pairs,
                                           const Code& code, const Registers& held) {
    LaneTileOf<kCoding, Code> tile;
#pragma unroll
    for (int i = 0; i < lane_vectors(kCoding); ++i) {
      tile.v[i] = load_shared(tiles + kTile * tile_size(kCoding) + i * 512);
    }
    GroupScale scale[2];
    if constexpr (kCoding == Coding::kCcq) {
      scale[0] = GroupScale::of<kTile % 2 * 2>(pairs, held);
      scale[1] = GroupScale::of<kTile % 2 * 2 + 1>(pairs, held);
    }
    add_part<kTile, 0>(tile, from, scale[0], code, held);
    add_part<kTile, 1>(tile, from, scale[0], code, held);
    add_part<kTile, 2>(tile, from, scale[1], code, held);
    add_part<kTile, 3>(tile, from, scale[1], code, held);
  }

  template <int kTile, int kPart, typename Code>
  __device__ __forceinline__ void add_part(LaneTileOf<kCoding, Code>& tile, uint32_t from,
                                           const GroupScale& scale, const Code& code,
                                           const Registers& held) {
    const uint4 b = load_shared(from + kTile * 256 + kPart * 64);
    uint32_t a[2][4];
    tile.template decode<kPart, 0>(code, scale, held, a[0]);
    tile.template decode<kPart, 1>(code, scale, held, a[1]);
    mma_f16(v, a[0], b.x, b.y);
    mma_f16(v, a[1], b.z, b.w);
  }
};

template <Coding kOf>
struct Halves {
  static constexpr Coding kCoding = kOf;

  __device__ static int row_bytes(int k) { return stream_row_bytes(k); }

  static constexpr bool kEven = true;  // a chunk takes as long for eight rows as for one

  /// Calls f with the sums for a group of so many rows.
  template <typename F>
  __device__ __forceinline__ static void with_sums(int, F f) {
    HalfSums<kCoding> sums;
    f(sums);
  }

  /// Calls f with what decodes this lane's columns, `column` and the eighth behind it.
  template <typename F>
  __device__ __forceinline__ static void with_code(const ExpertWeight& w, int64_t column, F f) {
    if constexpr (kCoding != Coding::kCcq) {
      f(LaneCode<false>());
    } else {
      const bool proven =
          __ldg(&w.codes[column].proven) != 0 && __ldg(&w.codes[column + 8].proven) != 0;
      if (__all_sync(kFullMask, proven)) {
        LaneCode<false> code;
        code.load(w.codes, w.exact, column);
        return f(code);
      }
      BoundedCode bounded;
      if (__all_sync(kFullMask, bounded.load(w.exact, column))) return f(bounded);
      LaneCode<true> code;
      code.load(w.codes, w.exact, column);
      f(code);
    }
  }

  /// Rows of a round on their way to shared memory.
  struct Converter {
    unsigned* tops;      // of each row, zero before and after
    float* row_inverse;  // of each row's power of two

    /// Rows to shared memory as float16. All warps. `source(row)`: a row's first vector. `begun` is
    /// called when the first loads are on their way.
    template <typename Source, typename Begun>
    __device__ __forceinline__ void convert(int count, int width, uint32_t rows, Source source,
                                            Begun begun) const {
      const int padded = (width + kChunkK - 1) / kChunkK * kChunkK;
      Rows part(padded);
      for (int first = 0; first < max(count, 1); first += part.at_once) {
        part.load(first, count, width, source);
        begun();
        part.find_tops(first, count, width, tops);
        __syncthreads();
        part.store(first, count, padded, tops, rows, stream_row_bytes(width));
      }
      if (threadIdx.x < count) {
        row_inverse[threadIdx.x] = inverse_scale(row_scale(__uint_as_float(tops[threadIdx.x])));
      }
      __syncthreads();
      if (threadIdx.x < kStreamRows) tops[threadIdx.x] = 0;
    }
  };
};

#endif

}  // namespace fd::cuda::stream

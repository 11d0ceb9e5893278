// The persistent kernel's products in integers (stream.cuh): faster than halves, with other bits.
//
// Every 64 rows of K, which share a local scale, are a group. In it a row of x is fixed point of 16
// bits in two signed digits, 256 hi + lo, times a power of two of the group's own; a byte of CCQ
// becomes one register of four unsigned fields, [4 f2, f0, 4 f3, f1] of rows 2, 0, 3, 1 of its
// four. So x is multiplied by 4 beside it for rows 0 and 1, and a group's products are an exact
// integer, which is scaled as a whole: nothing is multiplied for a weight.
//
// m16n8k32 has eight columns, a row of x takes two. With one row of x a group's columns are used
// for four groups of K, each with zeros where the others have theirs; with two rows for two.
//
// The sum of a row: group i of K goes to sum i % 4, in order, and the four are added as
// (0 + 1) + (2 + 3). That does not depend on how many rows there are, so that a row has the same
// bits beside any others in this kernel.
#pragma once

#include "decode_digits.cuh"
#include "stream_rows.cuh"

namespace fd::cuda::stream {

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

constexpr int kGroupK = 64;
constexpr int kGroupBytes = kGroupK * 2;  // [digit][c][step of 32][8 rows]
constexpr int kHalfGroups = 4;            // of half a chunk, whose local scales are one word
constexpr uint32_t kMagic = 0x4b000000u;  // 2^23: the mantissa counts ones

/// A block of columns for up to kRows rows of a group of slots.
template <int kRows>
struct DigitSums {
  static constexpr int kSets = kRows <= 4 ? 1 : kRows / 4;      // of eight columns
  static constexpr int kTogether = kRows <= 4 ? 4 / kRows : 1;  // groups of K in one set
  static constexpr int kSums = kHalfGroups / kTogether;  // of the four of a row, in this lane
  static constexpr int kFloats = kSums * kSets * 2 < 4 ? 4 : kSums * kSets * 2;
  static constexpr int kTokens = kSets;
  float v[kFloats];           // [set][sum][column g, g + 8]
  uint32_t x[kSets];          // where this lane's digits of the next half of a chunk lie
  uint32_t scales[kSets];     // and the numbers of its group
  uint4 b[kTogether][kSets];  // digits; zero where another lane's group of K has them

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kFloats; ++i) v[i] = 0.0f;
    if constexpr (kTogether > 1) {
#pragma unroll
      for (int i = 0; i < kTogether; ++i) b[i][0] = make_uint4(0, 0, 0, 0);
    }
  }

  template <typename Row>
  __device__ __forceinline__ void look_at(int chunk, int padded, Row row) {
    const int lane = threadIdx.x % kWarp, g = lane / 4, c = lane % 4;
#pragma unroll
    for (int s = 0; s < kSets; ++s) {
      const int mine = kRows >= 4 ? g / 2 + 4 * s : g / 2 % kRows;
      x[s] = row(mine) + g % 2 * 64 + c * 16 + chunk * (kChunkK * 2);
      const int of_sum = kRows >= 4 ? c + 4 * s : c % kRows;
      scales[s] = row(of_sum) + padded * 2 + (kRows >= 4 ? 0 : c / kRows * 8) +
                  chunk * (kChunkK / kGroupK * 8);
    }
  }

  template <typename Code>
  __device__ __forceinline__ void add_chunk(uint32_t chunk, const Code& code,
                                            const Registers& held) {
    const int lane = threadIdx.x % kWarp;
    const uint32_t pairs = chunk + lane / 4 * 8, tiles = chunk + 64 + lane * 16;
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      add_half(load_shared_word(pairs + half * 4), tiles + half * 1024, code, held);
#pragma unroll
      for (int s = 0; s < kSets; ++s) {
        x[s] += kHalfGroups * kGroupBytes;
        scales[s] += kHalfGroups * 8;
      }
    }
  }

  __device__ __forceinline__ float value(int i, int column) const { return v[2 * i + column]; }
  __device__ static int token(int i) { return threadIdx.x % 4 + 4 * i; }

  /// Adds up each row's four sums: those of token(i) are in v[2i] and v[2i + 1] then.
  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int s = 0; s < kSets; ++s) {
#pragma unroll
      for (int column = 0; column < 2; ++column) {
        float sum[kSums];
#pragma unroll
        for (int i = 0; i < kSums; ++i) sum[i] = v[(s * kSums + i) * 2 + column];
#pragma unroll
        for (int across = kRows; across < 4; across *= 2) {
#pragma unroll
          for (int i = 0; i < kSums; ++i) {
            sum[i] = __fadd_rn(sum[i], __shfl_xor_sync(kFullMask, sum[i], across));
          }
        }
        if constexpr (kSums == 4)
          sum[0] = __fadd_rn(sum[0], sum[1]), sum[1] = __fadd_rn(sum[2], sum[3]);
        if constexpr (kSums >= 2) sum[0] = __fadd_rn(sum[0], sum[1]);
        v[s * 2 + column] = sum[0];
      }
    }
  }

 private:
  /// The digits of group kGroup of half a chunk. Where groups share a set, a lane reads those of
  /// its own group alone.
  template <int kGroup>
  __device__ __forceinline__ void load_digits() {
    const int g = threadIdx.x % kWarp / 4;
#pragma unroll
    for (int s = 0; s < kSets; ++s) {
      uint4& to = b[kGroup % kTogether][s];
      const uint32_t from = x[s] + kGroup * kGroupBytes;
      if constexpr (kTogether == 1) {
        to = load_shared(from);
      } else {
        load_shared_if(g / (8 / kTogether) == kGroup % kTogether, from, to);
      }
    }
  }

  template <typename Code>
  __device__ __forceinline__ void add_half(uint32_t pairs, uint32_t tiles, const Code& code,
                                           const Registers& held) {
    const uint4 words[2] = {load_shared(tiles), load_shared(tiles + 512)};
    int sums[kSets][4];
    add_group<0>(pairs, words[0], code, held, sums);
    add_group<1>(pairs, words[0], code, held, sums);
    add_group<2>(pairs, words[1], code, held, sums);
    add_group<3>(pairs, words[1], code, held, sums);
  }

  template <int kGroup, typename Code>
  __device__ __forceinline__ void add_group(uint32_t pairs, const uint4& words, const Code& code,
                                            const Registers& held, int (&sums)[kSets][4]) {
    constexpr int kSum = kGroup / kTogether;
    if constexpr (kGroup % kTogether == 0) {
#pragma unroll
      for (int s = 0; s < kSets; ++s) {
        const int offset = static_cast<int>(load_shared_word(scales[s] + kGroup * 8 + 4));
        sums[s][0] = sums[s][2] = 0;
        sums[s][1] = sums[s][3] = offset;
      }
    }
    load_digits<kGroup>();
    const uint4(&digits)[kSets] = b[kGroup % kTogether];
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      const uint32_t word = word_of(words, kGroup % 2 * 2 + step);
      const uint32_t a[4] = {
          code.template fields<0>(word, held), code.template fields<2>(word, held),
          code.template fields<1>(word, held), code.template fields<3>(word, held)};
#pragma unroll
      for (int s = 0; s < kSets; ++s) {
        mma_u8s8(sums[s], a, step == 0 ? digits[s].x : digits[s].z,
                 step == 0 ? digits[s].y : digits[s].w);
      }
    }
    if constexpr (kGroup % kTogether == kTogether - 1) {
      add_sums<kSum>(pairs, sums);
    }
  }

  /// Scales a set's integers and adds them to sum kSum of this lane.
  template <int kSum>
  __device__ __forceinline__ void add_sums(uint32_t pairs, const int (&sums)[kSets][4]) {
    const int c = threadIdx.x % 4;
    float local[2];
    if constexpr (kTogether == 1) {
      constexpr int kBits = 4 * kSum;
      constexpr float kUnit = 1.0f / (1 << kBits);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t nibble = and_or(pairs >> 16 * i, 15u << kBits, kMagic);
        local[i] = __fmaf_rn(__uint_as_float(nibble), kUnit, -8388608.0f * kUnit);
      }
    } else {
      const uint32_t own = pairs >> (4 * (kSum * kTogether + c / kRows));
      local[0] = __fadd_rn(__uint_as_float(and_or(own, 15u, kMagic)), -8388608.0f);
      local[1] = __fmaf_rn(__uint_as_float(and_or(own, 15u << 16, kMagic)), 1.0f / 65536, -128.0f);
    }
#pragma unroll
    for (int s = 0; s < kSets; ++s) {
      const float unit = __uint_as_float(load_shared_word(scales[s] + kSum * kTogether * 8));
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float product = __int2float_rn(sums[s][2 * i] * 256 + sums[s][2 * i + 1]);
        float& to = v[(s * kSums + kSum) * 2 + i];
        to = __fmaf_rn(__fmul_rn(local[i], unit), product, to);
      }
    }
  }
};

struct Digits {
  static constexpr Coding kCoding = Coding::kCcq;
  static constexpr bool kEven = false;

  __device__ static int row_bytes(int k) { return digit_row_bytes(k); }

  /// Of a chunk for so many rows, up to a factor, as measured on an H100: by it blocks whose groups
  /// have more rows get less to do.
  __device__ static int cost(int rows) {
    return rows == 1 ? 16 : rows == 2 ? 17 : rows <= 4 ? 20 : 28;
  }

  template <typename F>
  __device__ __forceinline__ static void with_sums(int rows, F f) {
    if (rows == 1) {
      DigitSums<1> sums;
      f(sums);
    } else if (rows == 2) {
      DigitSums<2> sums;
      f(sums);
    } else if (rows <= 4) {
      DigitSums<4> sums;
      f(sums);
    } else {
      DigitSums<8> sums;
      f(sums);
    }
  }

  template <typename F>
  __device__ __forceinline__ static void with_code(const ExpertWeight& w, int64_t column, F f) {
    const bool proven =
        __ldg(&w.codes[column].proven) != 0 && __ldg(&w.codes[column + 8].proven) != 0;
    if (__all_sync(kFullMask, proven)) {
      DigitCode<false> code;
      code.load(w, column);
      return f(code);
    }
    DigitCode<true> code;
    code.load(w, column);
    f(code);
  }

  struct Converter {
    static constexpr int kBatch = 2;
    unsigned* tops;  // for Halves
    float* row_inverse;

    /// See Halves. A thread has a few vectors of a row, kBatch of them on their way at once.
    template <typename Source, typename Begun>
    __device__ __forceinline__ void convert(int count, int width, uint32_t rows, Source source,
                                            Begun begun) const {
      const int padded = (width + kChunkK - 1) / kChunkK * kChunkK, stride = digit_row_bytes(width);
      int row = 0, i = threadIdx.x;
#pragma unroll 1
      do {
        uint4 v[kBatch];
        int rows_of[kBatch], places[kBatch];
#pragma unroll
        for (int u = 0; u < kBatch; ++u) {
          rows_of[u] = row;
          places[u] = i;
          v[u] = row < count && i < width / 8 ? __ldcg(source(row) + i) : make_uint4(0, 0, 0, 0);
          i += kThreads;
          if (i >= padded / 8) i = threadIdx.x, ++row;
        }
        begun();
#pragma unroll
        for (int u = 0; u < kBatch; ++u) {
          if (rows_of[u] < count && places[u] < padded / 8) {
            put_digits(v[u], places[u], rows + rows_of[u] * stride, padded);
          }
        }
      } while (row < count);
      if (threadIdx.x < count) row_inverse[threadIdx.x] = 1.0f;
      __syncthreads();
    }
  };
};

#endif

}  // namespace fd::cuda::stream

// The layout in which quantised and expert weights live on a card, and how registers are filled
// from it.
//
// A tile is 16 columns (outputs n) by 128 rows (inputs k) of W, stored as [vector][lane] 16-byte
// vectors so that a warp reads it in whole 512-byte lines and each lane receives exactly its own
// operands of mma.m16n8k16 with the WEIGHT as matrix A: lane (g = lane / 4, c = lane % 4) owns
// columns g and g + 8 and, in each 32-row chunk, rows 8c .. 8c + 7. The sum over k may run in any
// order as long as activations use the same one, so both take 8 consecutive k per lane: one 16-byte
// load of x, two bytes of CCQ code. Tiles of one column block follow each other along k: [expert][N
// / 16][K / 128][tile].
#pragma once

#include "common.cuh"
#include "weight_kind.h"

namespace fd::cuda {

constexpr int kChunks = kTileRows / 32;

/// 16-byte vectors per lane and tile.
constexpr int tile_vectors(Kind kind) {
  return kind == Kind::kDense ? 8 : kind == Kind::kInt8 ? 4 : kind == Kind::kInt4 ? 2 : 1;
}

constexpr int64_t tile_bytes(Kind kind) { return int64_t{512} * tile_vectors(kind); }

/// One packed weight (all experts of it). Vectors are padded to 16 columns, `experts` is 1 for a
/// linear.
struct TiledWeight {
  const uint4* tiles;  // [experts][n_tiles][k_tiles][vectors][32]
  const uint16_t*
      local_scale;  // CCQ: [experts][n_tiles][k_tiles][8], low byte column g, high byte g + 8
  const float* code_scale;    // CCQ: [experts][16 n_tiles]
  const float* code_bias;     // CCQ: code_zp + 0.5, rounded once
  const float* column_scale;  // super scale or weight scale; unused for dense
  int in_features;
  int out_features;
  int n_tiles;
  int k_tiles;
};

#ifdef __CUDACC__

constexpr uint32_t kBf16_128 = 0x43004300u;  // 128.0 twice: seven mantissa bits count units
constexpr uint32_t kFieldMask = 0x003f003fu;
constexpr uint32_t kMinus160 = 0xc320c320u;  // -(128 + 32)
constexpr uint32_t kMinus136 = 0xc308c308u;  // -(128 + 8)

__device__ __forceinline__ uint32_t add2(uint32_t a, uint32_t b) {
  const __nv_bfloat162 sum = __hadd2(*reinterpret_cast<const __nv_bfloat162*>(&a),
                                     *reinterpret_cast<const __nv_bfloat162*>(&b));
  return *reinterpret_cast<const uint32_t*>(&sum);
}

/// Byte `kIndex` of `word` as float32, without the slow integer conversion: the byte becomes the
/// low mantissa byte of `magic`, 2^23.
template <int kIndex>
__device__ __forceinline__ float byte_to_float(uint32_t word, uint32_t magic) {
  return __uint_as_float(__byte_perm(word, magic, 0x7440 | kIndex)) - 8388608.0f;
}

/// Constants that have to sit in registers: an instruction takes one immediate, and a second one
/// would be moved in for every use. `zero` is a 0 that the compiler cannot know.
struct DecodeConstants {
  uint32_t one_two_eight;
  uint32_t magic;

  __device__ explicit DecodeConstants(uint32_t zero)
      : one_two_eight(kBf16_128 ^ zero), magic(0x4b000000u ^ zero) {}
};

/// Decodes one CCQ byte to its four 6-bit fields as packed bf16 pairs of 128 + field:
/// first = rows 4r, 4r + 1; second = rows 4r + 2, 4r + 3. Exact.
///
/// Two additions rounded down leave d + 0xb4c0 and (d >> 3) + 2^15 in low mantissa bits; one
/// multiply-add puts d in the high and d >> 3 in the low half of a word (0xb4c0 cancels the float
/// exponent that the addend carries), where both field pairs can be masked out, the second after
/// one shift. Five of the nine instructions run on the FMA pipe, four on the integer pipe that has
/// half its rate.
template <Kind kKind, int kIndex>
__device__ __forceinline__ void decode_ccq(uint32_t word, float scale, float bias,
                                           const DecodeConstants& constants, uint32_t& first,
                                           uint32_t& second) {
  const float raw = __fmaf_rn(byte_to_float<kIndex>(word, constants.magic), scale, bias);
  uint32_t t;
  if constexpr (kKind == Kind::kCcq) {
    const uint32_t d = __float_as_uint(__fadd_rd(raw, 12582912.0f + 46272.0f));
    const uint32_t d_over_8 = __float_as_uint(__fmaf_rd(raw, 0.125f, 12582912.0f + 32768.0f));
    t = d * 65536u + d_over_8;
  } else {
    const uint32_t d = static_cast<uint32_t>(__float2int_rd(raw));
    t = (d << 16) | ((d >> 3) & 0xfffu);
  }
  second = and_or(t, kFieldMask, constants.one_two_eight);
  first = and_or(t >> 6, kFieldMask, constants.one_two_eight);
}

/// The per-column numbers that a lane needs: columns g and g + 8.
struct LaneColumns {
  float code_scale[2];
  float code_bias[2];
  DecodeConstants constants{0u};
};

template <Kind kKind>
__device__ __forceinline__ LaneColumns load_columns(const TiledWeight& w, int64_t column) {
  LaneColumns lane{};
  if constexpr (is_ccq(kKind)) {
    lane.constants = DecodeConstants(static_cast<uint32_t>(w.n_tiles) >> 30);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      lane.code_scale[i] = w.code_scale[column + 8 * i];
      lane.code_bias[i] = w.code_bias[column + 8 * i];
    }
  }
  return lane;
}

__device__ __forceinline__ uint32_t component(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

/// A operand of k-step `kStep` (16 of the 32 rows) of chunk `kChunk`, exact small integers in bf16.
/// CCQ yields 128 + field: the caller removes 160.
template <Kind kKind, int kChunk, int kStep>
__device__ __forceinline__ void decode_fragment(const uint4 (&v)[tile_vectors(kKind)],
                                                const LaneColumns& lane, uint32_t (&a)[4]) {
  if constexpr (is_ccq(kKind)) {
    const uint32_t word = component(v[0], kChunk);
    decode_ccq<kKind, kStep>(word, lane.code_scale[0], lane.code_bias[0], lane.constants, a[0],
                             a[2]);
    decode_ccq<kKind, kStep + 2>(word, lane.code_scale[1], lane.code_bias[1], lane.constants, a[1],
                                 a[3]);
  } else if constexpr (kKind == Kind::kInt4) {
    // nibble j holds element 2j and nibble j + 4 element 2j + 1: one mask gives a pair
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t word = component(v[kChunk / 2], 2 * (kChunk % 2) + i);
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        const uint32_t nibbles = (word >> (4 * (2 * kStep + pair))) & 0x000f000fu;
        a[i + 2 * pair] = add2(nibbles | kBf16_128, kMinus136);
      }
    }
  } else if constexpr (kKind == Kind::kInt8) {
    // b - 128 = (128 + low 7 bits) - (256 or 128): all three are exact in bf16
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t word = component(v[kChunk], 2 * i + kStep);
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        const uint32_t bytes = __byte_perm(word, 0u, pair == 0 ? 0x4140 : 0x4342);
        const uint32_t low = (bytes & 0x007f007fu) | kBf16_128;
        a[i + 2 * pair] = add2(low, (bytes & 0x00800080u) ^ 0xc380c380u);
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      a[i] = component(v[2 * kChunk + i], 2 * kStep);
      a[i + 2] = component(v[2 * kChunk + i], 2 * kStep + 1);
    }
  }
}

/// Local scales (0..15) of 64-row group `kGroup` of the tile for columns g and g + 8, as float32.
template <int kGroup>
__device__ __forceinline__ void local_scales(uint32_t pair, const DecodeConstants& constants,
                                             float (&scale)[2]) {
  constexpr int kShift = kGroup == 0 ? 4 : 0;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    scale[i] = __uint_as_float(and_or(pair >> (8 * i + kShift), 15u, constants.magic)) - 8388608.0f;
  }
}

#endif  // __CUDACC__

}  // namespace fd::cuda

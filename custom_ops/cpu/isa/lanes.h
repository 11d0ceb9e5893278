// Sixteen float32 lanes, one value type for plain C++, AVX2 and AVX-512.
// For files under cpu/isa, which are compiled once per set into the namespace fd::FD_ISA. Such
// files must not instantiate templates of the standard library: the linker could keep the AVX-512
// instance for everybody.
//
// Every function gives the same bits on every set: each lane does one IEEE operation, fused only
// where the name says fma (the build forbids contraction), and reductions add lane i to lane i + 8,
// then + 4, + 2, + 1. A kernel written in these functions is therefore bit-identical on all
// machines, which the tests check.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(FD_ISA_AVX512) || defined(FD_ISA_AMX)
#define FD_LANES_512 1
#endif
#if defined(FD_LANES_512) || defined(FD_ISA_AVX2) || defined(FD_ISA_AVXVNNI)
#define FD_LANES_X86 1
// GCC 12 warns of its own undefined-by-intent registers (its bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#define FD_ALWAYS_INLINE inline __attribute__((always_inline))
#define FD_INLINE static FD_ALWAYS_INLINE __attribute__((unused))

namespace fd::FD_ISA {

#if defined(FD_LANES_512)

struct F16 {
  __m512 v;
};
// Micro-kernel tile of matmul_rows: 6 x 4 accumulators + 4 columns + 1 broadcast fit in 32
// registers.
constexpr int kTileRows = 6;
constexpr int kTileCols = 4;

FD_INLINE F16 splat(float x) { return {_mm512_set1_ps(x)}; }
FD_INLINE F16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
FD_INLINE void store(float* p, F16 a) { _mm512_storeu_ps(p, a.v); }
FD_INLINE __mmask16 first_lanes(int n) { return n >= 16 ? 0xffff : n > 0 ? (1u << n) - 1 : 0; }
FD_INLINE F16 load_first(const float* p, int n, float fill) {
  return {_mm512_mask_loadu_ps(_mm512_set1_ps(fill), first_lanes(n), p)};
}
FD_INLINE void store_first(float* p, F16 a, int n) {
  _mm512_mask_storeu_ps(p, first_lanes(n), a.v);
}
FD_INLINE F16 load_bf16(const uint16_t* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
FD_INLINE F16 add(F16 a, F16 b) { return {_mm512_add_ps(a.v, b.v)}; }
FD_INLINE F16 sub(F16 a, F16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
FD_INLINE F16 mul(F16 a, F16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
FD_INLINE F16 div(F16 a, F16 b) { return {_mm512_div_ps(a.v, b.v)}; }
FD_INLINE F16 fma(F16 a, F16 b, F16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// a > b ? a : b, so a NaN in b comes through and a NaN in a is dropped (the x86 rule, kept
// everywhere).
FD_INLINE F16 max(F16 a, F16 b) { return {_mm512_max_ps(a.v, b.v)}; }
FD_INLINE F16 min(F16 a, F16 b) { return {_mm512_min_ps(a.v, b.v)}; }
FD_INLINE uint32_t mask_nan(F16 a) { return _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q); }
FD_INLINE uint32_t mask_greater(F16 a, F16 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ); }
FD_INLINE uint32_t mask_equal(F16 a, F16 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ); }
FD_INLINE F16 keep_first(F16 a, int n, float fill) {
  return {_mm512_mask_blend_ps(first_lanes(n), _mm512_set1_ps(fill), a.v)};
}
// y * 2^n for the float16-lane exponent carried in the low bits of a "magic" sum; see exp16.
FD_INLINE F16 scale_by_power(F16 y, F16 magic_sum, F16 magic) {
  const __m512i n =
      _mm512_sub_epi32(_mm512_castps_si512(magic_sum.v), _mm512_castps_si512(magic.v));
  const __m512i half = _mm512_srai_epi32(n, 1);
  const __m512i rest = _mm512_sub_epi32(n, half);
  const __m512i bias = _mm512_set1_epi32(127);
  const __m512 a = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(half, bias), 23));
  const __m512 b = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(rest, bias), 23));
  return {_mm512_mul_ps(_mm512_mul_ps(y.v, a), b)};
}
struct F8Half {
  __m256 v;
};
FD_INLINE F8Half fold_add(F16 a) {
  return {_mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1))};
}
FD_INLINE F8Half fold_max(F16 a) {
  return {_mm256_max_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1))};
}

struct U64Sum {
  __m512i v;
};
FD_INLINE U64Sum no_sum() { return {_mm512_setzero_si512()}; }
FD_INLINE U64Sum add_fixed(U64Sum sum, F16 scaled) {
  const __m512i low = _mm512_cvtps_epi64(_mm512_castps512_ps256(scaled.v));
  const __m512i high = _mm512_cvtps_epi64(_mm512_extractf32x8_ps(scaled.v, 1));
  return {_mm512_add_epi64(sum.v, _mm512_add_epi64(low, high))};
}
FD_INLINE uint64_t total(U64Sum sum) { return (uint64_t)_mm512_reduce_add_epi64(sum.v); }

FD_INLINE void transpose16(const float* in, int in_stride, float* out, int out_stride) {
  __m512 r[16], t[16];
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_ps(in + (int64_t)i * in_stride);
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int k = 0; k < 2; ++k) {
      const __m512d a = _mm512_castps_pd(t[i + k]);
      const __m512d b = _mm512_castps_pd(t[i + 2 + k]);
      r[i + 2 * k] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      r[i + 2 * k + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
  }
  // r[4q + c] holds, in its 128-bit part p, column 4p + c of the rows 4q .. 4q+3.
  for (int c = 0; c < 4; ++c) {
    const __m512 even_low = _mm512_shuffle_f32x4(r[c], r[4 + c], 0x88);
    const __m512 odd_low = _mm512_shuffle_f32x4(r[c], r[4 + c], 0xdd);
    const __m512 even_high = _mm512_shuffle_f32x4(r[8 + c], r[12 + c], 0x88);
    const __m512 odd_high = _mm512_shuffle_f32x4(r[8 + c], r[12 + c], 0xdd);
    const int64_t s = out_stride;
    _mm512_storeu_ps(out + (0 + c) * s, _mm512_shuffle_f32x4(even_low, even_high, 0x88));
    _mm512_storeu_ps(out + (4 + c) * s, _mm512_shuffle_f32x4(odd_low, odd_high, 0x88));
    _mm512_storeu_ps(out + (8 + c) * s, _mm512_shuffle_f32x4(even_low, even_high, 0xdd));
    _mm512_storeu_ps(out + (12 + c) * s, _mm512_shuffle_f32x4(odd_low, odd_high, 0xdd));
  }
}

#elif defined(FD_LANES_X86)

struct F16 {
  __m256 lo, hi;
};
constexpr int kTileRows = 3;
constexpr int kTileCols = 2;

FD_INLINE F16 splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
FD_INLINE F16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
FD_INLINE void store(float* p, F16 a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
FD_INLINE __m256i first_lanes(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
FD_INLINE F16 keep_first(F16 a, int n, float fill) {
  const __m256 f = _mm256_set1_ps(fill);
  return {_mm256_blendv_ps(f, a.lo, _mm256_castsi256_ps(first_lanes(n))),
          _mm256_blendv_ps(f, a.hi, _mm256_castsi256_ps(first_lanes(n - 8)))};
}
FD_INLINE F16 load_first(const float* p, int n, float fill) {
  const F16 a = {_mm256_maskload_ps(p, first_lanes(n)),
                 _mm256_maskload_ps(p + 8, first_lanes(n - 8))};
  return keep_first(a, n, fill);
}
FD_INLINE void store_first(float* p, F16 a, int n) {
  _mm256_maskstore_ps(p, first_lanes(n), a.lo);
  _mm256_maskstore_ps(p + 8, first_lanes(n - 8), a.hi);
}
FD_INLINE __m256 widen_bf16(const uint16_t* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
FD_INLINE F16 load_bf16(const uint16_t* p) { return {widen_bf16(p), widen_bf16(p + 8)}; }
FD_INLINE F16 add(F16 a, F16 b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
FD_INLINE F16 sub(F16 a, F16 b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
FD_INLINE F16 mul(F16 a, F16 b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
FD_INLINE F16 div(F16 a, F16 b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
FD_INLINE F16 fma(F16 a, F16 b, F16 c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
FD_INLINE F16 max(F16 a, F16 b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
FD_INLINE F16 min(F16 a, F16 b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
#define FD_COMPARE(a, b, how)                                         \
  ((uint32_t)_mm256_movemask_ps(_mm256_cmp_ps((a).lo, (b).lo, how)) | \
   (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps((a).hi, (b).hi, how)) << 8)
FD_INLINE uint32_t mask_nan(F16 a) { return FD_COMPARE(a, a, _CMP_UNORD_Q); }
FD_INLINE uint32_t mask_greater(F16 a, F16 b) { return FD_COMPARE(a, b, _CMP_GT_OQ); }
FD_INLINE uint32_t mask_equal(F16 a, F16 b) { return FD_COMPARE(a, b, _CMP_EQ_OQ); }
#undef FD_COMPARE
FD_INLINE __m256 scale_half(__m256 y, __m256 magic_sum, __m256 magic) {
  const __m256i n = _mm256_sub_epi32(_mm256_castps_si256(magic_sum), _mm256_castps_si256(magic));
  const __m256i half = _mm256_srai_epi32(n, 1);
  const __m256i rest = _mm256_sub_epi32(n, half);
  const __m256i bias = _mm256_set1_epi32(127);
  const __m256 a = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
  const __m256 b = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23));
  return _mm256_mul_ps(_mm256_mul_ps(y, a), b);
}
FD_INLINE F16 scale_by_power(F16 y, F16 magic_sum, F16 magic) {
  return {scale_half(y.lo, magic_sum.lo, magic.lo), scale_half(y.hi, magic_sum.hi, magic.hi)};
}
struct F8Half {
  __m256 v;
};
FD_INLINE F8Half fold_add(F16 a) { return {_mm256_add_ps(a.lo, a.hi)}; }
FD_INLINE F8Half fold_max(F16 a) { return {_mm256_max_ps(a.lo, a.hi)}; }

struct U64Sum {
  __m256i v;
};
FD_INLINE U64Sum no_sum() { return {_mm256_setzero_si256()}; }
FD_INLINE __m256i to_fixed4(__m128 x) {
  // Adding 2^52 leaves round(x) in the mantissa, rounded to nearest even like a conversion.
  const __m256d magic = _mm256_set1_pd(4503599627370496.0);
  const __m256i bits = _mm256_castpd_si256(_mm256_add_pd(_mm256_cvtps_pd(x), magic));
  return _mm256_sub_epi64(bits, _mm256_castpd_si256(magic));
}
FD_INLINE U64Sum add_fixed(U64Sum sum, F16 scaled) {
  __m256i s = _mm256_add_epi64(sum.v, to_fixed4(_mm256_castps256_ps128(scaled.lo)));
  s = _mm256_add_epi64(s, to_fixed4(_mm256_extractf128_ps(scaled.lo, 1)));
  s = _mm256_add_epi64(s, to_fixed4(_mm256_castps256_ps128(scaled.hi)));
  return {_mm256_add_epi64(s, to_fixed4(_mm256_extractf128_ps(scaled.hi, 1)))};
}
FD_INLINE uint64_t total(U64Sum sum) {
  const __m128i two =
      _mm_add_epi64(_mm256_castsi256_si128(sum.v), _mm256_extracti128_si256(sum.v, 1));
  return (uint64_t)_mm_cvtsi128_si64(two) + (uint64_t)_mm_extract_epi64(two, 1);
}

FD_INLINE void transpose8(const float* in, int64_t in_stride, float* out, int64_t out_stride) {
  __m256 r[8], t[8];
  for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(in + i * in_stride);
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int c = 0; c < 4; ++c) {
    _mm256_storeu_ps(out + c * out_stride, _mm256_permute2f128_ps(r[c], r[4 + c], 0x20));
    _mm256_storeu_ps(out + (4 + c) * out_stride, _mm256_permute2f128_ps(r[c], r[4 + c], 0x31));
  }
}
FD_INLINE void transpose16(const float* in, int in_stride, float* out, int out_stride) {
  for (int64_t i = 0; i < 16; i += 8) {
    for (int64_t k = 0; k < 16; k += 8) {
      transpose8(in + i * in_stride + k, in_stride, out + k * out_stride + i, out_stride);
    }
  }
}

#else

struct F16 {
  float v[16];
};
constexpr int kTileRows = 2;
constexpr int kTileCols = 1;

#define FD_EACH_LANE(expression) \
  F16 r;                         \
  for (int i = 0; i < 16; ++i) { \
    r.v[i] = (expression);       \
  }                              \
  return r
FD_INLINE F16 splat(float x) { FD_EACH_LANE(x); }
FD_INLINE F16 load(const float* p) { FD_EACH_LANE(p[i]); }
FD_INLINE void store(float* p, F16 a) { memcpy(p, a.v, sizeof(a.v)); }
FD_INLINE F16 keep_first(F16 a, int n, float fill) { FD_EACH_LANE(i < n ? a.v[i] : fill); }
FD_INLINE F16 load_first(const float* p, int n, float fill) { FD_EACH_LANE(i < n ? p[i] : fill); }
FD_INLINE void store_first(float* p, F16 a, int n) {
  memcpy(p, a.v, sizeof(float) * (size_t)(n < 16 ? n : 16));
}
FD_INLINE float bits_to_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}
FD_INLINE uint32_t float_to_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}
FD_INLINE F16 load_bf16(const uint16_t* p) { FD_EACH_LANE(bits_to_float((uint32_t)p[i] << 16)); }
FD_INLINE F16 add(F16 a, F16 b) { FD_EACH_LANE(a.v[i] + b.v[i]); }
FD_INLINE F16 sub(F16 a, F16 b) { FD_EACH_LANE(a.v[i] - b.v[i]); }
FD_INLINE F16 mul(F16 a, F16 b) { FD_EACH_LANE(a.v[i] * b.v[i]); }
FD_INLINE F16 div(F16 a, F16 b) { FD_EACH_LANE(a.v[i] / b.v[i]); }
FD_INLINE F16 fma(F16 a, F16 b, F16 c) { FD_EACH_LANE(__builtin_fmaf(a.v[i], b.v[i], c.v[i])); }
FD_INLINE F16 max(F16 a, F16 b) { FD_EACH_LANE(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
FD_INLINE F16 min(F16 a, F16 b) { FD_EACH_LANE(a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
#define FD_EACH_BIT(condition)                                              \
  uint32_t mask = 0;                                                        \
  for (int i = 0; i < 16; ++i) mask |= (condition) ? uint32_t{1} << i : 0u; \
  return mask
FD_INLINE uint32_t mask_nan(F16 a) { FD_EACH_BIT(a.v[i] != a.v[i]); }
FD_INLINE uint32_t mask_greater(F16 a, F16 b) { FD_EACH_BIT(a.v[i] > b.v[i]); }
FD_INLINE uint32_t mask_equal(F16 a, F16 b) { FD_EACH_BIT(a.v[i] == b.v[i]); }
#undef FD_EACH_BIT
FD_INLINE float scale_lane(float y, float magic_sum, float magic) {
  const uint32_t n = float_to_bits(magic_sum) - float_to_bits(magic);
  const uint32_t half = (uint32_t)((int32_t)n >> 1);
  return y * bits_to_float((half + 127) << 23) * bits_to_float((n - half + 127) << 23);
}
FD_INLINE F16 scale_by_power(F16 y, F16 magic_sum, F16 magic) {
  FD_EACH_LANE(scale_lane(y.v[i], magic_sum.v[i], magic.v[i]));
}
#undef FD_EACH_LANE
struct F8Half {
  float v[8];
};
FD_INLINE F8Half fold_add(F16 a) {
  F8Half r;
  for (int i = 0; i < 8; ++i) r.v[i] = a.v[i] + a.v[i + 8];
  return r;
}
FD_INLINE F8Half fold_max(F16 a) {
  F8Half r;
  for (int i = 0; i < 8; ++i) r.v[i] = a.v[i] > a.v[i + 8] ? a.v[i] : a.v[i + 8];
  return r;
}

struct U64Sum {
  uint64_t v;
};
FD_INLINE U64Sum no_sum() { return {0}; }
FD_INLINE U64Sum add_fixed(U64Sum sum, F16 scaled) {
  const double magic = 4503599627370496.0;
  uint64_t base;
  memcpy(&base, &magic, sizeof(base));
  for (int i = 0; i < 16; ++i) {
    const double shifted = (double)scaled.v[i] + magic;
    uint64_t bits;
    memcpy(&bits, &shifted, sizeof(bits));
    sum.v += bits - base;
  }
  return sum;
}
FD_INLINE uint64_t total(U64Sum sum) { return sum.v; }

FD_INLINE void transpose16(const float* in, int in_stride, float* out, int out_stride) {
  for (int64_t i = 0; i < 16; ++i) {
    for (int64_t k = 0; k < 16; ++k) out[k * out_stride + i] = in[i * in_stride + k];
  }
}

#endif

#ifdef FD_LANES_X86
FD_INLINE float reduce_add(F16 a) {
  const __m256 eight = fold_add(a).v;
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)));
}
FD_INLINE float reduce_max(F16 a) {
  const __m256 eight = fold_max(a).v;
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps(x, x, 1)));
}
#else
FD_INLINE float reduce_add(F16 a) {
  F8Half x = fold_add(a);
  for (int step = 4; step > 0; step /= 2) {
    for (int i = 0; i < step; ++i) x.v[i] = x.v[i] + x.v[i + step];
  }
  return x.v[0];
}
FD_INLINE float reduce_max(F16 a) {
  F8Half x = fold_max(a);
  for (int step = 4; step > 0; step /= 2) {
    for (int i = 0; i < step; ++i) x.v[i] = x.v[i] > x.v[i + step] ? x.v[i] : x.v[i + step];
  }
  return x.v[0];
}
#endif

// e^x, error below 1 ulp (tests/unit/ops/test_activation.py), 0 below -104, inf above 88.73, NaN
// kept. x = n ln 2 + r with |r| <= ln(2)/2; e^r = 1 + r + r^2 P(r), P of degree 4 fitted for the
// relative error of e^r (3e-9).
FD_INLINE F16 exp16(F16 x) {
  const F16 magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  x = min(splat(89.0f), max(splat(-104.0f), x));
  const F16 magic_sum = fma(x, splat(1.44269504088896341f), magic);
  const F16 n = sub(magic_sum, magic);
  F16 r = fma(n, splat(-0.693359375f), x);        // the high part of ln 2 has 9 bits: exact
  r = fma(n, splat(2.12194440054690583e-4f), r);  // minus the low part
  F16 p = fma(splat(0x1.6a2432p-10f), r, splat(0x1.1239e2p-7f));
  p = fma(p, r, splat(0x1.5558f2p-5f));
  p = fma(p, r, splat(0x1.555492p-3f));
  p = fma(p, r, splat(0x1.fffffcp-2f));
  const F16 y = add(fma(p, mul(r, r), r), splat(1.0f));
  return scale_by_power(y, magic_sum, magic);
}

}  // namespace fd::FD_ISA

// Sixteen int32 lanes and exact dot products of bytes, on top of lanes.h.
//
// A Quads holds four unsigned bytes for each of sixteen columns: rows 4r .. 4r + 3 of a tile. `dot`
// adds to each column the product of its four bytes with four signed digits of the activation.
// AVX2, whose products of bytes are of 16 bits, has kernels of its own instead (nibble_rows.h,
// word_rows.h). All of it is integer arithmetic without overflow, hence the same on every
// instruction set.
#pragma once

#include "ccq.h"
#include "lanes.h"

namespace fd::FD_ISA {

#if defined(FD_LANES_512)

// 4 rows x 2 tiles x 3 digits are 24 sums of the 32 registers. Two tiles share the broadcast
// digits: with one, the load ports limit the speed, and at one row the latency of three chains of
// sums.
constexpr int kRowBlock = 4;
constexpr int kTileBlock = 2;
constexpr int kDenseRowBlock = 8;

struct I16 {
  __m512i v;
};
struct Quads {
  __m512i v;
};

FD_INLINE I16 splat_int(int32_t x) { return {_mm512_set1_epi32(x)}; }
FD_INLINE I16 load_ints(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
FD_INLINE I16 load_bytes(const uint8_t* p) {
  return {_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p))};
}
FD_INLINE I16 add(I16 a, I16 b) { return {_mm512_add_epi32(a.v, b.v)}; }
FD_INLINE I16 shift_left(I16 a, int n) { return {_mm512_slli_epi32(a.v, n)}; }
FD_INLINE I16 shift_right(I16 a, int n) { return {_mm512_srli_epi32(a.v, n)}; }
FD_INLINE I16 bit_and(I16 a, int32_t mask) {
  return {_mm512_and_si512(a.v, _mm512_set1_epi32(mask))};
}
FD_INLINE I16 sub(I16 a, I16 b) { return {_mm512_sub_epi32(a.v, b.v)}; }
FD_INLINE I16 max(I16 a, I16 b) { return {_mm512_max_epi32(a.v, b.v)}; }
FD_INLINE I16 min(I16 a, I16 b) { return {_mm512_min_epi32(a.v, b.v)}; }
FD_INLINE void store(int32_t* p, I16 a) { _mm512_storeu_si512(p, a.v); }
FD_INLINE F16 to_float(I16 a) { return {_mm512_cvtepi32_ps(a.v)}; }
FD_INLINE I16 floor_to_int(F16 a) {
  return {_mm512_cvt_roundps_epi32(a.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)};
}

FD_INLINE __m512i splat_digits(const int8_t* four) {
  int32_t word;
  memcpy(&word, four, sizeof(word));
  return _mm512_set1_epi32(word);
}
FD_INLINE I16 dot(I16 sum, Quads w, const int8_t* four) {
  return {_mm512_dpbusd_epi32(sum.v, w.v, splat_digits(four))};
}
FD_INLINE void store(uint8_t* p, Quads w) { _mm512_store_si512(p, w.v); }
FD_INLINE Quads load_quads(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
FD_INLINE Quads load_nibbles(const uint8_t* p, bool high) {
  const __m512i both = _mm512_loadu_si512(p);
  const __m512i shifted = high ? _mm512_srli_epi16(both, 4) : both;
  return {_mm512_and_si512(shifted, _mm512_set1_epi8(0x0f))};
}
#elif defined(FD_LANES_X86)

constexpr int kRowBlock = 2;  // 12 sums of the 16 registers
constexpr int kTileBlock = 1;
constexpr int kDenseRowBlock = 3;

struct I16 {
  __m256i lo, hi;
};
struct Quads {
  __m256i lo, hi;
};

FD_INLINE I16 splat_int(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
FD_INLINE __m256i load_8_bytes(const uint8_t* p) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
}
FD_INLINE I16 load_bytes(const uint8_t* p) { return {load_8_bytes(p), load_8_bytes(p + 8)}; }
FD_INLINE I16 add(I16 a, I16 b) {
  return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)};
}
FD_INLINE I16 shift_left(I16 a, int n) {
  return {_mm256_slli_epi32(a.lo, n), _mm256_slli_epi32(a.hi, n)};
}
FD_INLINE I16 shift_right(I16 a, int n) {
  return {_mm256_srli_epi32(a.lo, n), _mm256_srli_epi32(a.hi, n)};
}
FD_INLINE I16 bit_and(I16 a, int32_t mask) {
  const __m256i m = _mm256_set1_epi32(mask);
  return {_mm256_and_si256(a.lo, m), _mm256_and_si256(a.hi, m)};
}
FD_INLINE I16 load_ints(const int32_t* p) {
  return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 8))};
}
FD_INLINE I16 sub(I16 a, I16 b) {
  return {_mm256_sub_epi32(a.lo, b.lo), _mm256_sub_epi32(a.hi, b.hi)};
}
FD_INLINE I16 max(I16 a, I16 b) {
  return {_mm256_max_epi32(a.lo, b.lo), _mm256_max_epi32(a.hi, b.hi)};
}
FD_INLINE I16 min(I16 a, I16 b) {
  return {_mm256_min_epi32(a.lo, b.lo), _mm256_min_epi32(a.hi, b.hi)};
}
FD_INLINE void store(int32_t* p, I16 a) {
  _mm256_storeu_si256((__m256i*)p, a.lo);
  _mm256_storeu_si256((__m256i*)(p + 8), a.hi);
}
FD_INLINE F16 to_float(I16 a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
FD_INLINE I16 floor_to_int(F16 a) {
  return {_mm256_cvttps_epi32(_mm256_floor_ps(a.lo)), _mm256_cvttps_epi32(_mm256_floor_ps(a.hi))};
}

FD_INLINE __m256i splat_digits(const int8_t* four) {
  int32_t word;
  memcpy(&word, four, sizeof(word));
  return _mm256_set1_epi32(word);
}
FD_INLINE void store(uint8_t* p, Quads w) {
  _mm256_store_si256((__m256i*)p, w.lo);
  _mm256_store_si256((__m256i*)p + 1, w.hi);
}
FD_INLINE Quads load_quads(const uint8_t* p) {
  return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)p + 1)};
}
FD_INLINE __m256i nibbles(__m256i both, bool high) {
  return _mm256_and_si256(high ? _mm256_srli_epi16(both, 4) : both, _mm256_set1_epi8(0x0f));
}
FD_INLINE Quads load_nibbles(const uint8_t* p, bool high) {
  const Quads both = load_quads(p);
  return {nibbles(both.lo, high), nibbles(both.hi, high)};
}

#if defined(FD_ISA_AVXVNNI)
FD_INLINE I16 dot(I16 sum, Quads w, const int8_t* four) {
  const __m256i x = splat_digits(four);
  return {_mm256_dpbusd_avx_epi32(sum.lo, w.lo, x), _mm256_dpbusd_avx_epi32(sum.hi, w.hi, x)};
}
#endif

#else

constexpr int kRowBlock = 1;
constexpr int kTileBlock = 1;
constexpr int kDenseRowBlock = 1;

struct I16 {
  int32_t v[16];
};
struct Quads {
  uint8_t v[64];
};

#define FD_EACH_INT(expression)                       \
  I16 r;                                              \
  for (int i = 0; i < 16; ++i) r.v[i] = (expression); \
  return r
FD_INLINE I16 splat_int(int32_t x) { FD_EACH_INT(x); }
FD_INLINE I16 load_bytes(const uint8_t* p) { FD_EACH_INT(p[i]); }
// Sums wrap around, as those of the vector instructions do.
FD_INLINE I16 add(I16 a, I16 b) { FD_EACH_INT((int32_t)((uint32_t)a.v[i] + (uint32_t)b.v[i])); }
FD_INLINE I16 sub(I16 a, I16 b) { FD_EACH_INT((int32_t)((uint32_t)a.v[i] - (uint32_t)b.v[i])); }
FD_INLINE I16 max(I16 a, I16 b) { FD_EACH_INT(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
FD_INLINE I16 min(I16 a, I16 b) { FD_EACH_INT(a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
FD_INLINE void store(int32_t* p, I16 a) { memcpy(p, a.v, sizeof(a.v)); }
FD_INLINE I16 floor_to_int(F16 a) { FD_EACH_INT((int32_t)__builtin_floorf(a.v[i])); }
FD_INLINE I16 shift_left(I16 a, int n) { FD_EACH_INT((int32_t)((uint32_t)a.v[i] << n)); }
FD_INLINE I16 shift_right(I16 a, int n) { FD_EACH_INT((int32_t)((uint32_t)a.v[i] >> n)); }
FD_INLINE I16 bit_and(I16 a, int32_t mask) { FD_EACH_INT(a.v[i] & mask); }
FD_INLINE F16 to_float(I16 a) {
  F16 r;
  for (int i = 0; i < 16; ++i) r.v[i] = (float)a.v[i];
  return r;
}
FD_INLINE I16 dot_bytes(I16 sum, const uint8_t* w, const int8_t* four) {
  FD_EACH_INT(sum.v[i] + w[4 * i] * four[0] + w[4 * i + 1] * four[1] + w[4 * i + 2] * four[2] +
              w[4 * i + 3] * four[3]);
}
#undef FD_EACH_INT
FD_INLINE I16 dot(I16 sum, Quads w, const int8_t* four) { return dot_bytes(sum, w.v, four); }
FD_INLINE void store(uint8_t* p, Quads w) { memcpy(p, w.v, sizeof(w.v)); }
FD_INLINE Quads load_quads(const uint8_t* p) {
  Quads w;
  memcpy(w.v, p, sizeof(w.v));
  return w;
}
FD_INLINE Quads load_nibbles(const uint8_t* p, bool high) {
  Quads w;
  for (int i = 0; i < 64; ++i) w.v[i] = high ? p[i] >> 4 : p[i] & 15;
  return w;
}
#endif

}  // namespace fd::FD_ISA

// From the bytes of 2-bit weights to their four fields, in two ways that give the same bits.
//
// Exact: the reference's own multiply-add and floor in float32 (ccq.h), for any column.
// Integer: (base + byte * multiplier) >> 15, for the columns where integer_codes() has found such
// numbers and compared all 256 bytes. It needs no conversion, and where the processor takes bytes
// from any bit (AVX-512) the fields come straight out of the sum.
//
// 64 stored bytes are four quads of rows of 16 columns: [column][quad].
#pragma once

#include "../linear_kernels.h"
#include "int_lanes.h"

namespace fd::FD_ISA {

// --- finding the integers ------------------------------------------------------------------------

constexpr int kQuadsPerVector = 4;

// Multipliers tried beside the nearest one. Random columns: 1 in 3,000 has none, with 1 as with 8.
constexpr int kNeighbours = 2;
// What two signed 16-bit factors, 1 and 128, reach.
constexpr float kLargestSlope = 128.9f;

// The integers (base + byte * multiplier) of a column whose code is floor(byte * scale + offset)
// lie in [code << 15, (code + 1) << 15) for all bytes. With one multiplier the bases that fit are
// an interval: its ends, less the first byte's code, are `low` and `high`. All arithmetic wraps
// around; the ends are small as long as the slope is.
struct Bases {
  I16 low, high;

  void narrow(I16 difference) {
    low = max(low, difference);
    high = min(high, difference);
  }
};

// Fills in the integers and returns true if all 16 columns have some; else leaves `codes` alone.
FD_INLINE bool integer_codes(CcqCodes& codes) {
  const F16 scale = load(codes.exact.scale), offset = load(codes.exact.offset);
  const F16 size = max(scale, sub(splat(0.0f), scale));
  if (mask_greater(size, splat(kLargestSlope))) return false;
  const I16 nearest = floor_to_int(fma(scale, splat(1 << kCcqShift), splat(0.5f)));
  const I16 first = floor_to_int(offset);
  constexpr int kTries = 2 * kNeighbours + 1;
  Bases bases[kTries];
  for (Bases& b : bases) b = {splat_int(0), splat_int(0)};
  I16 product = splat_int(0);  // byte * nearest
  for (int byte = 1; byte < 256; ++byte) {
    const I16 code = floor_to_int(fma(splat((float)byte), scale, offset));
    product = add(product, nearest);
    const I16 difference = sub(shift_left(sub(code, first), kCcqShift), product);
    for (int t = 0; t < kTries; ++t) {
      bases[t].narrow(sub(difference, splat_int(byte * (t - kNeighbours))));
    }
  }
  int32_t multiplier[16], base[16];
  uint32_t found = 0;
  for (int t = 0; t < kTries; ++t) {
    int32_t near[16], low[16], high[16], start[16];
    store(near, nearest);
    store(low, bases[t].low);
    store(high, bases[t].high);
    store(start, shift_left(first, kCcqShift));
    for (int c = 0; c < 16; ++c) {
      // The last integer that fits every byte is 2^15 - 1 beyond the least difference.
      if ((found >> c & 1) || low[c] - high[c] > (1 << kCcqShift) - 1) continue;
      multiplier[c] = near[c] + t - kNeighbours;
      base[c] = (int32_t)((uint32_t)start[c] + (uint32_t)low[c]);
      found |= 1u << c;
    }
  }
  if (found != 0xffff) return false;
  memcpy(codes.integer.multiplier, multiplier, sizeof(multiplier));
  memcpy(codes.integer.base, base, sizeof(base));
  return true;
}

// --- decoding ------------------------------------------------------------------------------------

#if defined(FD_LANES_512)

// Byte `quad` of each column's four.
FD_INLINE I16 load_code_bytes(const uint8_t* p, int quad) {
  return bit_and(shift_right(load_ints((const int32_t*)p), 8 * quad), 0xff);
}

// Bytes of a 64-bit lane, which holds two codes, from these bits on; kBit is the codes' lowest.
template <int kBit>
FD_INLINE Quads fields_at(__m512i codes) {
  constexpr long long kLow =
      (kBit + 9) | (kBit + 6) << 8 | (kBit + 3) << 16 | (long long)kBit << 24;
  const __m512i positions = _mm512_set1_epi64(kLow | (kLow + 0x20202020) << 32);
  const __m512i fields = _mm512_multishift_epi64_epi8(positions, codes);
  return {_mm512_and_si512(fields, _mm512_set1_epi8(ccq::kFieldMask))};
}
FD_INLINE Quads exact_fields(I16 codes) { return fields_at<0>(codes.v); }

struct IntegerDecoder {
  __m512i factors, base;

  explicit IntegerDecoder(const CcqCodes& codes) {
    // multiplier = low + 128 * high
    const __m512i multiplier = _mm512_loadu_si512(codes.integer.multiplier);
    const __m512i rounded = _mm512_srai_epi32(multiplier, 7);
    const __m512i high = _mm512_min_epi32(_mm512_max_epi32(rounded, _mm512_set1_epi32(-32768)),
                                          _mm512_set1_epi32(32767));
    const __m512i low = _mm512_sub_epi32(multiplier, _mm512_slli_epi32(high, 7));
    factors = _mm512_or_si512(_mm512_slli_epi32(high, 16),
                              _mm512_and_si512(low, _mm512_set1_epi32(0xffff)));
    base = _mm512_loadu_si512(codes.integer.base);
  }

  // A byte becomes the 16-bit numbers (byte, 128 * byte): the bits between come from its
  // neighbours, which are zeros. The two products and the base are then one instruction.
  Quads quad(const uint8_t* p, int quad) const {
    const bool odd = quad % 2;
    const __m512i mask = _mm512_set1_epi16((short)(odd ? 0xff00 : 0x00ff));
    const __m512i bytes = _mm512_and_si512(_mm512_loadu_si512(p), mask);
    const long long at = 8 * quad;
    const long long low = at | (at + 8) << 8 | ((at + 57) & 63) << 16 | (at + 1) << 24;
    const long long high =
        ((at + 32) & 63) | ((at + 40) & 63) << 8 | (at + 25) << 16 | ((at + 33) & 63) << 24;
    const __m512i positions = _mm512_set1_epi64(low | high << 32);
    const __m512i numbers = _mm512_multishift_epi64_epi8(positions, bytes);
    return fields_at<kCcqShift>(_mm512_dpwssd_epi32(base, numbers, factors));
  }
};

#elif defined(FD_LANES_X86)

FD_INLINE __m256i code_bytes(const uint8_t* p, int quad) {
  const char at = (char)quad, none = (char)0x80;
  const __m128i order = _mm_setr_epi8(at, none, none, none, at + 4, none, none, none, at + 8, none,
                                      none, none, at + 12, none, none, none);
  return _mm256_shuffle_epi8(_mm256_loadu_si256((const __m256i*)p),
                             _mm256_broadcastsi128_si256(order));
}
FD_INLINE I16 load_code_bytes(const uint8_t* p, int quad) {
  return {code_bytes(p, quad), code_bytes(p + 32, quad)};
}

// The four 6-bit fields, as bytes, of the codes that begin at bit 8 * kByte. AVX2 has no shift by
// different amounts within 32 bits, but two 16-bit multiplications of (d, d) are such shifts: 6
// instructions instead of 11.
template <int kByte>
FD_INLINE __m256i fields_at(__m256i codes) {
  constexpr char a = kByte, b = kByte + 1;
  const __m256i twice =
      _mm256_shuffle_epi8(codes, _mm256_broadcastsi128_si256(_mm_setr_epi8(
                                     a, b, a, b, a + 4, b + 4, a + 4, b + 4, a + 8, b + 8, a + 8,
                                     b + 8, a + 12, b + 12, a + 12, b + 12)));
  // Low word: d >> 9 and d << 2; high word: d >> 3 and d << 8.
  const __m256i even = _mm256_mulhi_epu16(twice, _mm256_set1_epi32((1 << 13) << 16 | 1 << 7));
  const __m256i odd = _mm256_mullo_epi16(twice, _mm256_set1_epi32(1 << 8 << 16 | 1 << 2));
  return _mm256_or_si256(_mm256_and_si256(even, _mm256_set1_epi16(ccq::kFieldMask)),
                         _mm256_and_si256(odd, _mm256_set1_epi16(ccq::kFieldMask << 8)));
}
FD_INLINE Quads exact_fields(I16 codes) { return {fields_at<0>(codes.lo), fields_at<0>(codes.hi)}; }

// Byte `quad` of each column's four, as a 32-bit number: on as many kinds of ports as there are.
FD_INLINE __m256i byte_of(__m256i bytes, int quad) {
  if (quad == 0) return _mm256_and_si256(bytes, _mm256_set1_epi32(0xff));
  if (quad == 3) return _mm256_srli_epi32(bytes, 24);
  const char at = (char)quad, none = (char)0x80;
  const __m128i order = _mm_setr_epi8(at, none, none, none, at + 4, none, none, none, at + 8, none,
                                      none, none, at + 12, none, none, none);
  return _mm256_shuffle_epi8(bytes, _mm256_broadcastsi128_si256(order));
}

// Twice the integers, so that a code begins at a byte.
struct IntegerDecoder {
  I16 multiplier, base;

  // Of eight columns' bytes `quad` and `quad + 1`: 16 bits each, the highest of them noise.
  template <int kHalf>
  __attribute__((always_inline)) __m256i two_codes(__m256i bytes, int quad) const {
    const __m256i factor = kHalf ? multiplier.hi : multiplier.lo, zero = kHalf ? base.hi : base.lo;
    const __m256i a = _mm256_add_epi32(_mm256_mullo_epi32(byte_of(bytes, quad), factor), zero);
    const __m256i b = _mm256_add_epi32(_mm256_mullo_epi32(byte_of(bytes, quad + 1), factor), zero);
    return _mm256_blend_epi16(_mm256_srli_epi32(a, 16), b, 0xaa);
  }

  explicit IntegerDecoder(const CcqCodes& codes)
      : multiplier(shift_left(load_ints(codes.integer.multiplier), 1)),
        base(shift_left(load_ints(codes.integer.base), 1)) {}

  Quads quad(const uint8_t* p, int quad) const {
    const __m256i lo = _mm256_mullo_epi32(code_bytes(p, quad), multiplier.lo);
    const __m256i hi = _mm256_mullo_epi32(code_bytes(p + 32, quad), multiplier.hi);
    static_assert(kCcqShift + 1 == 16);
    return {fields_at<2>(_mm256_add_epi32(lo, base.lo)),
            fields_at<2>(_mm256_add_epi32(hi, base.hi))};
  }
};

#else

FD_INLINE I16 load_code_bytes(const uint8_t* p, int quad) {
  I16 bytes;
  for (int c = 0; c < 16; ++c) bytes.v[c] = p[c * kQuadsPerVector + quad];
  return bytes;
}
FD_INLINE Quads exact_fields(I16 codes) {
  Quads w;
  for (int c = 0; c < 16; ++c) {
    for (int j = 0; j < 4; ++j) w.v[4 * c + j] = (uint8_t)ccq::field(codes.v[c], j);
  }
  return w;
}

struct IntegerDecoder {
  const CcqCodes& codes;

  explicit IntegerDecoder(const CcqCodes& of) : codes(of) {}

  Quads quad(const uint8_t* p, int quad) const {
    I16 found;
    for (int c = 0; c < 16; ++c) {
      const uint32_t product =
          p[c * kQuadsPerVector + quad] * (uint32_t)codes.integer.multiplier[c];
      found.v[c] = (int32_t)((product + (uint32_t)codes.integer.base[c]) >> kCcqShift);
    }
    return exact_fields(found);
  }
};

#endif

struct ExactDecoder {
  F16 scale, offset;

#if defined(FD_LANES_X86) && !defined(FD_LANES_512)
  template <int kHalf>
  __attribute__((always_inline)) __m256i two_codes(__m256i bytes, int quad) const {
    const __m256i b = code<kHalf>(bytes, quad + 1);
    return _mm256_blend_epi16(code<kHalf>(bytes, quad), _mm256_slli_epi32(b, 16), 0xaa);
  }
  template <int kHalf>
  __attribute__((always_inline)) __m256i code(__m256i bytes, int quad) const {
    const __m256 value =
        _mm256_fmadd_ps(_mm256_cvtepi32_ps(byte_of(bytes, quad)), kHalf ? scale.hi : scale.lo,
                        kHalf ? offset.hi : offset.lo);
    return _mm256_cvttps_epi32(_mm256_floor_ps(value));
  }
#endif

  explicit ExactDecoder(const CcqCodes& codes)
      : scale(load(codes.exact.scale)), offset(load(codes.exact.offset)) {}

  Quads quad(const uint8_t* p, int quad) const {
    return exact_fields(floor_to_int(fma(to_float(load_code_bytes(p, quad)), scale, offset)));
  }
};

}  // namespace fd::FD_ISA

// From the bytes of 2-bit weights to their four fields, in two ways that give the same bits.
//
// Exact: the reference's own multiply-add and floor in float32 (ccq.h), for any column.
// Integer: in 16-bit words, for the columns where integer_codes() has found numbers (CcqCodes) and
// compared all 256 bytes. It needs no conversion, and a vector takes twice as many.
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
// Columns that use the 15 bits of a code have at most 128.5; the sums below hold for twice as much.
constexpr float kLargestSlope = 128.9f;

// Integers are looked for as (base + byte * multiplier) >> kCodeShift. They lie in
// [code << 15, (code + 1) << 15) for all bytes. With one multiplier the bases that fit are an
// interval: its ends, less the first byte's code, are `low` and `high`. All arithmetic wraps
// around; the ends are small as long as the slope is.
constexpr int kCodeShift = 15;
struct Bases {
  I16 low, high;

  void narrow(I16 difference) {
    low = max(low, difference);
    high = min(high, difference);
  }
};

// Of an odd number, modulo 2^24: each step doubles the bits that are right, x * x = 1 mod 8.
FD_INLINE uint32_t inverse(uint32_t odd) {
  uint32_t x = odd;
  for (int bits = 3; bits < kCodeShift; bits *= 2) x *= 2 - odd * x;
  return x;
}

// The same numbers in words. With multiplier = slope * 2^15 + part, a `shift` is wanted such that
// shift * part ends in the last 15 bits of base: (byte + shift) * part then carries where
// byte * part + base does. If part ends in zero bits, those of base do not matter, and without them
// part has an inverse.
FD_INLINE void store_words(int32_t multiplier, int32_t base, int column, CcqCodes& codes) {
  constexpr uint32_t kPart = (1u << kCodeShift) - 1;
  const uint32_t part = (uint32_t)multiplier & kPart;
  const int zeros = part == 0 ? kCodeShift : __builtin_ctz(part);
  const uint32_t goal = ((uint32_t)base & kPart) >> zeros;
  const uint32_t shift = (goal * inverse(part >> zeros)) & (kPart >> zeros);
  codes.integer.slope[column] = (uint16_t)(multiplier >> kCodeShift);
  codes.integer.fraction[column] = (uint16_t)(part << (16 - kCodeShift));
  codes.integer.shift[column] = (uint16_t)shift;
  codes.integer.rest[column] =
      (uint16_t)((base >> kCodeShift) - (int32_t)(shift * part >> kCodeShift));
}

// Fills in the integers and returns true if all 16 columns have some; else leaves `codes` alone.
FD_INLINE bool integer_codes(CcqCodes& codes) {
  const F16 scale = load(codes.exact.scale), offset = load(codes.exact.offset);
  const F16 size = max(scale, sub(splat(0.0f), scale));
  if (mask_greater(size, splat(kLargestSlope))) return false;
  const I16 nearest = floor_to_int(fma(scale, splat(1 << kCodeShift), splat(0.5f)));
  const I16 first = floor_to_int(offset);
  constexpr int kTries = 2 * kNeighbours + 1;
  Bases bases[kTries];
  for (Bases& b : bases) b = {splat_int(0), splat_int(0)};
  I16 product = splat_int(0);  // byte * nearest
  for (int byte = 1; byte < 256; ++byte) {
    const I16 code = floor_to_int(fma(splat((float)byte), scale, offset));
    product = add(product, nearest);
    const I16 difference = sub(shift_left(sub(code, first), kCodeShift), product);
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
    store(start, shift_left(first, kCodeShift));
    for (int c = 0; c < 16; ++c) {
      // The last integer that fits every byte is 2^15 - 1 beyond the least difference.
      if ((found >> c & 1) || low[c] - high[c] > (1 << kCodeShift) - 1) continue;
      multiplier[c] = near[c] + t - kNeighbours;
      base[c] = (int32_t)((uint32_t)start[c] + (uint32_t)low[c]);
      found |= 1u << c;
    }
  }
  if (found != 0xffff) return false;
  for (int c = 0; c < 16; ++c) store_words(multiplier[c], base[c], c, codes);
  return true;
}

// --- decoding ------------------------------------------------------------------------------------

#if defined(FD_LANES_512)

// Bytes of a 64-bit lane, which holds codes from the bits `bit` and `bit` + 32 on.
FD_INLINE Quads fields_at(__m512i codes, int bit) {
  const long long low = (bit + 9) | (bit + 6) << 8 | (bit + 3) << 16 | (long long)bit << 24;
  const __m512i positions = _mm512_set1_epi64(low | (low + 0x20202020) << 32);
  const __m512i fields = _mm512_multishift_epi64_epi8(positions, codes);
  return {_mm512_and_si512(fields, _mm512_set1_epi8(ccq::kFieldMask))};
}

struct IntegerDecoder {
  __m512i slope, fraction, shift, rest;  // each column twice

  explicit IntegerDecoder(const CcqCodes& codes)
      : slope(twice(codes.integer.slope)),
        fraction(twice(codes.integer.fraction)),
        shift(twice(codes.integer.shift)),
        rest(twice(codes.integer.rest)) {}

  Quads quad(const uint8_t* p, int quad) const {
    return fields_at(codes(_mm512_loadu_si512(p), quad % 2), quad / 2 * 16);
  }

 private:
  static __m512i twice(const uint16_t* columns) {
    const __m512i once = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)columns));
    return _mm512_or_si512(once, _mm512_slli_epi32(once, 16));
  }
  // Of the quads `odd` and `odd` + 2; the highest bit of each is noise.
  __m512i codes(__m512i bytes, bool odd) const {
    const __m512i byte =
        odd ? _mm512_srli_epi16(bytes, 8) : _mm512_and_si512(bytes, _mm512_set1_epi16(0xff));
    const __m512i steps = _mm512_mulhi_epu16(_mm512_add_epi16(byte, shift), fraction);
    return _mm512_add_epi16(_mm512_add_epi16(_mm512_mullo_epi16(byte, slope), rest), steps);
  }
};

struct ExactDecoder {
  F16 scale, offset;

  explicit ExactDecoder(const CcqCodes& codes)
      : scale(load(codes.exact.scale)), offset(load(codes.exact.offset)) {}

  Quads quad(const uint8_t* p, int quad) const {
    const I16 bytes = bit_and(shift_right(load_ints((const int32_t*)p), 8 * quad), 0xff);
    return fields_at(floor_to_int(fma(to_float(bytes), scale, offset)).v, 0);
  }
};

#elif defined(FD_LANES_X86)

// Codes of eight columns in words: quad `odd` in the even ones, quad `odd` + 2 in the others. The
// highest bit of each is noise.
struct IntegerWords {
  __m256i slope, fraction, shift, rest;  // each column twice

  IntegerWords(const CcqCodes& codes, int column)
      : slope(twice(codes.integer.slope + column)),
        fraction(twice(codes.integer.fraction + column)),
        shift(twice(codes.integer.shift + column)),
        rest(twice(codes.integer.rest + column)) {}

  FD_ALWAYS_INLINE __m256i codes(__m256i bytes, bool odd) const {
    const __m256i byte =
        odd ? _mm256_srli_epi16(bytes, 8) : _mm256_and_si256(bytes, _mm256_set1_epi16(0xff));
    const __m256i steps = _mm256_mulhi_epu16(_mm256_add_epi16(byte, shift), fraction);
    return _mm256_add_epi16(_mm256_add_epi16(_mm256_mullo_epi16(byte, slope), rest), steps);
  }

 private:
  static __m256i twice(const uint16_t* columns) {
    const __m256i once = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)columns));
    return _mm256_or_si256(once, _mm256_slli_epi32(once, 16));
  }
};

struct ExactWords {
  __m256 scale, offset;

  ExactWords(const CcqCodes& codes, int column)
      : scale(_mm256_loadu_ps(codes.exact.scale + column)),
        offset(_mm256_loadu_ps(codes.exact.offset + column)) {}

  FD_ALWAYS_INLINE __m256i codes(__m256i bytes, bool odd) const {
    const __m256i shifted = odd ? _mm256_srli_epi32(bytes, 8) : bytes;
    const __m256i second = _mm256_slli_epi32(code(_mm256_srli_epi32(shifted, 16)), 16);
    return _mm256_blend_epi16(code(shifted), second, 0xaa);
  }

 private:
  FD_ALWAYS_INLINE __m256i code(__m256i bytes) const {
    const __m256i byte = _mm256_and_si256(bytes, _mm256_set1_epi32(0xff));
    const __m256 value = _mm256_fmadd_ps(_mm256_cvtepi32_ps(byte), scale, offset);
    return _mm256_cvttps_epi32(_mm256_floor_ps(value));
  }
};

// The four 6-bit fields, as bytes, of the codes that begin at byte kByte of 32 bits. AVX2 has no
// shift by different amounts within 32 bits, but two 16-bit multiplications of (d, d) are such
// shifts: 6 instructions instead of 11.
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

template <typename Words>
struct WordDecoder {
  Words lo, hi;

  explicit WordDecoder(const CcqCodes& codes) : lo(codes, 0), hi(codes, 8) {}

  Quads quad(const uint8_t* p, int quad) const {
    const __m256i a = lo.codes(_mm256_loadu_si256((const __m256i*)p), quad % 2);
    const __m256i b = hi.codes(_mm256_loadu_si256((const __m256i*)p + 1), quad % 2);
    return quad < 2 ? Quads{fields_at<0>(a), fields_at<0>(b)}
                    : Quads{fields_at<2>(a), fields_at<2>(b)};
  }
};
using IntegerDecoder = WordDecoder<IntegerWords>;
using ExactDecoder = WordDecoder<ExactWords>;

#else

FD_INLINE Quads fields_of(const int32_t (&codes)[16]) {
  Quads w;
  for (int c = 0; c < 16; ++c) {
    for (int j = 0; j < 4; ++j) w.v[4 * c + j] = (uint8_t)ccq::field(codes[c], j);
  }
  return w;
}

struct IntegerDecoder {
  const CcqCodes& codes;

  explicit IntegerDecoder(const CcqCodes& of) : codes(of) {}

  Quads quad(const uint8_t* p, int quad) const {
    int32_t found[16];
    for (int c = 0; c < 16; ++c) {
      const uint32_t byte = p[c * kQuadsPerVector + quad];
      const uint32_t steps = (byte + codes.integer.shift[c]) * codes.integer.fraction[c] >> 16;
      found[c] = (int32_t)(byte * codes.integer.slope[c] + steps + codes.integer.rest[c]);
    }
    return fields_of(found);
  }
};

struct ExactDecoder {
  const CcqCodes& codes;

  explicit ExactDecoder(const CcqCodes& of) : codes(of) {}

  Quads quad(const uint8_t* p, int quad) const {
    int32_t found[16];
    for (int c = 0; c < 16; ++c) {
      found[c] =
          ccq::code(p[c * kQuadsPerVector + quad], codes.exact.scale[c], codes.exact.offset[c]);
    }
    return fields_of(found);
  }
};

#endif

}  // namespace fd::FD_ISA

#include "bf16_rows.h"

#include <algorithm>
#include <cstring>

#include "parallel.h"

namespace fd::cpu {
namespace {

// Elements worth a thread's while: some 10 us.
constexpr int64_t kGrain = 40000;

uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

uint16_t nearest(float value) {
  constexpr uint32_t kQuiet = 0x40, kInfinity = 0x7F800000, kMagnitude = 0x7FFFFFFF;
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  // Rounding a NaN up could carry into the sign.
  const bool is_nan = (bits & kMagnitude) > kInfinity;
  return static_cast<uint16_t>(is_nan ? (bits >> 16) | kQuiet : rounded);
}

template <typename Function>
void each_row(int64_t count, int64_t width, const Function& function) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(width, 1));
  parallel_for(count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) function(r);
  });
}

}  // namespace

void widen_row(const uint16_t* x, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = float_of(uint32_t{x[i]} << 16);
}

void narrow_row(const float* x, int64_t count, uint16_t* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = nearest(x[i]);
}

void widen(Rows<const uint16_t> x, Rows<float> out) {
  each_row(x.count, x.width, [&](int64_t r) { widen_row(x[r], x.width, out[r]); });
}

void narrow(Rows<const float> x, Rows<uint16_t> out) {
  each_row(x.count, x.width, [&](int64_t r) { narrow_row(x[r], x.width, out[r]); });
}

}  // namespace fd::cpu

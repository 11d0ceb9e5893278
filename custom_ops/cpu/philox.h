// Philox4x32-10, the counter-based generator of Salmon, Moraes, Dror and Shaw, "Parallel random
// numbers: as easy as 1, 2, 3" (SC 2011): a draw is a function of key and counter, so it depends on
// nothing that was drawn before.
#pragma once

#include <array>
#include <cstdint>

namespace fd {

using PhiloxCounter = std::array<uint32_t, 4>;
using PhiloxKey = std::array<uint32_t, 2>;

inline PhiloxCounter philox4x32_10(PhiloxCounter x, PhiloxKey key) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * x[0];
    const uint64_t b = uint64_t{0xCD9E8D57} * x[2];
    x = {static_cast<uint32_t>(b >> 32) ^ x[1] ^ key[0], static_cast<uint32_t>(b),
         static_cast<uint32_t>(a >> 32) ^ x[3] ^ key[1], static_cast<uint32_t>(a)};
    key = {key[0] + 0x9E3779B9, key[1] + 0xBB67AE85};
  }
  return x;
}

// 64 uniform bits for the `step`-th token of a request with this seed.
inline uint64_t uniform_bits(int64_t seed, int64_t step) {
  const auto k = static_cast<uint64_t>(seed), c = static_cast<uint64_t>(step);
  const PhiloxCounter bits =
      philox4x32_10({static_cast<uint32_t>(c), static_cast<uint32_t>(c >> 32), 0, 0},
                    {static_cast<uint32_t>(k), static_cast<uint32_t>(k >> 32)});
  return bits[0] | uint64_t{bits[1]} << 32;
}

}  // namespace fd

// How fast memory can be read: the yardstick of the benchmarks.
#pragma once

#include <cstdint>

#include "cpu_features.h"

namespace fd {

struct ReadKernels {
  // Exclusive or of `words` 64-bit words, read once and in order.
  uint64_t (*fold)(const uint64_t* data, int64_t words);
};

FD_DECLARE_KERNELS(ReadKernels, read_kernels);

}  // namespace fd

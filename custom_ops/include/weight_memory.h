// Where the pages of weights lie.
#pragma once

#include <cstdint>
#include <vector>

namespace fd {

// Asks the kernel for the whole pages of memory that nobody has written yet: 2 MiB pages, which a
// stream of weights crosses without a miss of the address cache every 4 KiB, and dealing them out
// among `nodes` in turn where those are several, so that all their memory works at once whichever
// thread reads. Wishes: a kernel that refuses leaves the memory as it is. Returns whether the first
// and the second were granted.
struct Placement {
  bool huge;
  bool dealt;
};
Placement place_weights(uintptr_t address, int64_t bytes, bool huge, const std::vector<int>& nodes);

}  // namespace fd

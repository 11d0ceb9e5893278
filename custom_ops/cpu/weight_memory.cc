#include "weight_memory.h"

#ifdef __linux__
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fd {

#ifdef __linux__
namespace {

constexpr int kInterleave = 3;  // MPOL_INTERLEAVE; its header belongs to libnuma
constexpr int kMostNodes = 1024;
constexpr int kWordBits = 8 * sizeof(unsigned long);

bool deal_out(void* begin, size_t bytes, const std::vector<int>& nodes) {
  unsigned long mask[kMostNodes / kWordBits] = {};
  for (int node : nodes) {
    if (node < 0 || node >= kMostNodes) return false;
    mask[node / kWordBits] |= 1ul << (node % kWordBits);
  }
  // The kernel takes one bit less than it is told.
  return syscall(SYS_mbind, begin, bytes, kInterleave, mask, kMostNodes + 1, 0) == 0;
}

}  // namespace

Placement place_weights(uintptr_t address, int64_t bytes, bool huge,
                        const std::vector<int>& nodes) {
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = (address + page - 1) / page * page;
  const uintptr_t end = (address + static_cast<uintptr_t>(bytes)) / page * page;
  Placement placed{false, false};
  if (end <= begin) return placed;
  void* first = reinterpret_cast<void*>(begin);
  if (huge) placed.huge = madvise(first, end - begin, MADV_HUGEPAGE) == 0;
  if (nodes.size() > 1) placed.dealt = deal_out(first, end - begin, nodes);
  return placed;
}
#else
Placement place_weights(uintptr_t, int64_t, bool, const std::vector<int>&) {
  return {false, false};
}
#endif

}  // namespace fd

// Stands for custom_ops/cuda/ptx/signals.cuh.
#pragma once

#include <cuda_runtime.h>

namespace fd::cuda {

inline void wait_for_inputs() {}

/// The words become visible one by one.
inline void store_relaxed(uint4* to, const uint32_t (&v)[4]) {
  auto* const words = reinterpret_cast<uint32_t*>(to);
  for (int i = 0; i < 4; ++i) card::store_late(words + i, &v[i], 4);
  card::signal();
}
inline void load_relaxed(const uint4* from, uint32_t (&v)[4]) { card::poll(from, v, sizeof(v)); }

inline unsigned load_acquire(const unsigned* from) {
  unsigned value;
  card::poll(from, &value, sizeof(value));
  return value;
}
inline void add_release(unsigned* to, int count) {
  card::maybe_give_way();
  card::release();
  *to += count;
  card::signal();
}
inline unsigned increment(unsigned* to, unsigned last) {
  card::maybe_give_way();
  card::release();
  const unsigned before = *to;
  *to = before >= last ? 0 : before + 1;
  card::signal();
  return before;
}

inline void store_release_system(unsigned* to, unsigned value) {
  card::maybe_give_way();
  card::release();
  *to = value;
  card::signal();
}
inline unsigned load_acquire_system(const unsigned* from) { return load_acquire(from); }

/// The pairs become visible one by one.
inline void store_pairs_system(ulonglong2* to, uint64_t first, uint64_t second) {
  card::store_late(&to->x, &first, 8);
  card::store_late(&to->y, &second, 8);
  card::signal();
}
inline void load_pairs_system(const ulonglong2* from, uint64_t (&v)[2]) {
  card::poll(from, v, sizeof(v));
}

}  // namespace fd::cuda

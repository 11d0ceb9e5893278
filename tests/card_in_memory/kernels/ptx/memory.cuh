// Stands for custom_ops/cuda/ptx/memory.cuh.
#pragma once

#include <cuda_runtime.h>

namespace fd::cuda {

inline void prefetch(const void*) {}

inline uint4 load_stream(const uint4* p) { return *p; }

inline uint32_t shared_address(const void* p) { return card::shared_offset(p); }

template <typename T>
T load_shared_as(uint32_t address) {
  T value;
  if (address % sizeof(T) != 0) card::fail("a load of shared memory is not aligned");
  std::memcpy(&value, card::shared_at(address, sizeof(T)), sizeof(T));
  return value;
}
inline uint4 load_shared(uint32_t address) { return load_shared_as<uint4>(address); }
inline void load_shared_if(bool wanted, uint32_t address, uint4& v) {
  if (wanted) v = load_shared(address);
}
inline uint32_t load_shared_word(uint32_t address) { return load_shared_as<uint32_t>(address); }
inline void load_shared(uint32_t address, float (&v)[4]) {
  const uint4 bits = load_shared(address);
  std::memcpy(v, &bits, sizeof(bits));
}
template <typename T>
void store_shared_as(uint32_t address, const T& value) {
  if (address % sizeof(T) != 0) card::fail("a store to shared memory is not aligned");
  std::memcpy(card::shared_at(address, sizeof(T)), &value, sizeof(T));
}
inline void store_shared(uint32_t address, const uint4& v) { store_shared_as(address, v); }
inline void store_shared(uint32_t address, uint32_t first, uint32_t second) {
  store_shared_as(address, make_uint2(first, second));
}

inline void copy_async(void* shared, const void* global, bool valid) {
  card::copy_small(shared, valid ? global : nullptr);
}
inline void copy_commit() { card::commit_copies(); }
template <int kPending>
void copy_wait() {
  card::wait_copies(kPending);
}

}  // namespace fd::cuda

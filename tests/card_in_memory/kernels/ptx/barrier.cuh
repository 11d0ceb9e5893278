// Stands for custom_ops/cuda/ptx/barrier.cuh.
#pragma once

#include "memory.cuh"

namespace fd::cuda {

inline void barrier_init(uint32_t barrier, int arrivals) { card::init_phases(barrier, arrivals); }
inline void fence_async() {}
inline void barrier_publish() {}
inline void barrier_arrive(uint32_t barrier) { card::arrive(barrier, 0); }
inline void barrier_expect(uint32_t barrier, int bytes) { card::arrive(barrier, bytes); }
inline void barrier_wait(uint32_t barrier, uint32_t parity) { card::wait_phase(barrier, parity); }

inline bool elected() {
  card::meet(card::Meeting::kElect, nullptr, nullptr);
  return card::self->lane == card::elected_lane();
}

inline uint64_t streaming_policy() { return 0; }
inline uint64_t keeping_policy() { return 0; }

inline void bulk_copy(uint32_t to, const void* from, int bytes, uint32_t barrier, uint64_t) {
  card::copy_bulk(to, from, bytes, barrier);
}

inline void warpgroup_sync(int id) { card::sync(id, 128, true); }
inline bool warpgroup_and(int id, bool mine) { return card::sync(id, 128, mine); }

template <int kCount>
void give_registers() {
  card::meet(card::Meeting::kRegisters, nullptr, nullptr);
}
template <int kCount>
void take_registers() {
  card::meet(card::Meeting::kRegisters, nullptr, nullptr);
}

}  // namespace fd::cuda

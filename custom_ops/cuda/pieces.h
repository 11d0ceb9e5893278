// Scratch memory of a launch, cut into pieces.
#pragma once

#include <cstdint>

namespace fd::cuda {

constexpr int64_t kAlign = 256;

/// Cuts memory into aligned pieces; with a null start it only counts.
class Pieces {
 public:
  explicit Pieces(void* memory) : memory_(static_cast<uint8_t*>(memory)) {}

  template <typename T>
  T* take(int64_t count) {
    uint8_t* const at = memory_ == nullptr ? nullptr : memory_ + used_;
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
    used_ += (bytes + kAlign - 1) / kAlign * kAlign;
    return reinterpret_cast<T*>(at);
  }

  int64_t used() const { return used_; }

 private:
  uint8_t* memory_;
  int64_t used_ = 0;
};

}  // namespace fd::cuda

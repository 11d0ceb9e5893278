// Stands for custom_ops/cuda/ptx/wgmma.cuh.
#pragma once

#include <cuda_runtime.h>

namespace fd::cuda {

/// A lane's part of a product of its warp's 16 rows.
struct WgmmaPart {
  float* sums;
  const uint32_t* a;
  uint64_t matrix;
  int columns;
  bool bf16, onto;

  static void begin(card::Warp& warp) {
    if (warp.present != ~0u) card::fail("wgmma needs all lanes of the warp");
    const auto& first = *static_cast<WgmmaPart*>(warp.brought[0]);
    card::Product product{first.columns,     first.bf16, first.onto, first.matrix, {}, {},
                          warp.product_group};
    for (int lane = 0; lane < card::kLanes; ++lane) {
      const auto& part = *static_cast<WgmmaPart*>(warp.brought[lane]);
      if (part.matrix != first.matrix) card::fail("lanes name different matrices");
      product.sums[lane] = part.sums;
      product.a[lane] = part.a;
    }
    card::begin_product(warp, product);
  }
  void run() { card::meet(card::Meeting::kProduct, begin, this); }
};

template <int kN>
struct Wgmma {
  static void add(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b) {
    WgmmaPart{d, a, b, kN, false, true}.run();
  }
};

inline void wgmma_bf16(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b, int onto) {
  WgmmaPart{d[0], a, b, 64, true, onto != 0}.run();
}
inline void wgmma_bf16(float (&d)[16][4], const uint32_t (&a)[4], uint64_t b) {
  WgmmaPart{d[0], a, b, 128, true, true}.run();
}

inline void wgmma_fence() {
  card::meet(card::Meeting::kProduct, [](card::Warp& warp) { warp.fenced = true; }, nullptr);
}
inline void wgmma_commit() {
  auto commit = [](card::Warp& warp) {
    ++warp.product_group;
    warp.fenced = false;
  };
  card::meet(card::Meeting::kProduct, commit, nullptr);
}
template <int kPending>
void wgmma_wait() {
  auto wait = [](card::Warp& warp) { card::wait_products(warp, kPending); };
  card::meet(card::Meeting::kProduct, wait, nullptr);
}
template <int kTiles>
void pin(float (&)[kTiles][4]) {}

}  // namespace fd::cuda

// A tiled weight as Python holds it.
#pragma once

#include "../cuda/weight_tiles.cuh"

namespace fd::cuda {

/// Addresses and sizes, made once per weight.
struct Weight {
  Kind kind;
  TiledWeight tiled;
};

}  // namespace fd::cuda

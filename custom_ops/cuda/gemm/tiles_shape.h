// Heights of tiles that the kernels over sorted rows have; their plan has to know.
#pragma once

namespace fd::cuda {

constexpr int kMostLowRows = 16;    // where all tiles of a call are so low, they have a kernel
constexpr int kMostShortRows = 40;  // tiles of more rows are tall: another kernel of Hopper's
constexpr int kMostTallRows = 144;

}  // namespace fd::cuda

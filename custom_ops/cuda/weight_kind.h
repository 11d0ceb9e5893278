// How tiled weights are coded and how large their tiles are; free of CUDA, so that plans know.
#pragma once

namespace fd::cuda {

constexpr int kTileColumns = 16;
constexpr int kTileRows = 128;

/// How a tile is coded. kCcqWide decodes any code_scale/code_zp; kCcq needs |d| < 2^18 for every
/// byte, which is checked column by column when the weight is packed.
enum class Kind : int { kDense = 0, kInt8 = 1, kInt4 = 2, kCcq = 3, kCcqWide = 4 };

constexpr bool is_ccq(Kind kind) { return kind == Kind::kCcq || kind == Kind::kCcqWide; }

}  // namespace fd::cuda

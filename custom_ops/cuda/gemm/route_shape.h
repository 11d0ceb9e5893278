// Sizes of the router's kernels that their plan has to know.
#pragma once

namespace fd::cuda {

constexpr int kRouteTokens = 16;   // of a block
constexpr int kRouteExperts = 64;  // of a block
constexpr int kRouteDepth = 32;    // of k at once in shared memory
constexpr int kPieceSteps = 2;     // route depths in one piece of k
constexpr int kPieceRows = kPieceSteps * kRouteDepth;
constexpr int kGroupPieces = 8;  // pieces in one group

}  // namespace fd::cuda

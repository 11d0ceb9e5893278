// Sizes of the persistent kernel that its plan has to know.
#pragma once

namespace fd::cuda {

constexpr int kStreamWarps = 16;   // that multiply; one more feeds them
constexpr int kStreamGroup = 8;    // most slots of an expert at once: columns of mma.sync
constexpr int kStreamSlots = 128;  // most slots of a call
constexpr int kStreamRows = 2 * kStreamGroup;  // most rows of x that a block holds
constexpr int kStreamRowGap = 64;  // bytes between rows, so that reads of two do not collide
constexpr int kStreamChunkK = 512;
constexpr int kStreamFixedBytes = 6144;  // lists, barriers and what alignment takes

}  // namespace fd::cuda

// Sizes of attention's kernels that its plan has to know.
#pragma once

namespace fd::cuda {

constexpr int kBlockTokens = 64;     // a cache block, and a step of the running softmax
constexpr int kRows = 16;            // rows of one warp's tile: (token, query head of one KV group)
constexpr int kSegmentBits = 8;      // the shortest segment: 256 tokens
constexpr int kMaxSegmentsBits = 5;  // a context has at most 32 segments
constexpr int kMaxListed = 256;      // sequences of one launch: a thread lists each
constexpr int kMostTickets = 1024;   // counters of segments that are done

}  // namespace fd::cuda

// Sizes of the persistent kernel that its plan has to know.
#pragma once

#ifdef __CUDACC__
#define FD_HOST_DEVICE __host__ __device__
#else
#define FD_HOST_DEVICE
#endif

namespace fd::cuda {

constexpr int kStreamWarps = 16;
constexpr int kStreamGroup = 8;       // most slots of an expert at once: columns of mma.sync
constexpr int kStreamSlots = 256;     // most slots of a call
constexpr int kStreamRows = 32;       // most rows of x that a block holds
constexpr int kStreamWidest = 32768;  // most elements of a row, which the threads hold at once
constexpr int kStreamBlocks = kStreamWidest / 16;  // most blocks of columns of the output
constexpr int kStreamRowGap = 64;  // bytes between rows, so that reads of two do not collide
constexpr int kStreamChunkK = 512;
constexpr int kStreamFixedBytes = 16896;  // lists, sums, barriers and what alignment takes
constexpr int kStreamCopyBytes = 4096;    // 2 KB at once miss the bandwidth of 4 KB by a sixth
constexpr int kStreamHanded = 4;          // most 16-byte vectors that a lane hands on
constexpr int kStreamMostStages = 2;      // more in flight only hold up the loads of rows

FD_HOST_DEVICE constexpr int stream_row_bytes(int k) {
  return (k + kStreamChunkK - 1) / kStreamChunkK * kStreamChunkK * 2 + kStreamRowGap;
}

/// The same for digits: two bytes an element and eight for every 64, and rows that begin in banks
/// of their own.
FD_HOST_DEVICE constexpr int digit_row_bytes(int k) {
  const int padded = (k + kStreamChunkK - 1) / kStreamChunkK * kStreamChunkK;
  return padded * 2 + padded / 8 + 16;
}

FD_HOST_DEVICE constexpr int stream_copy_chunks(int chunk_bytes) {
  return (kStreamCopyBytes + chunk_bytes - 1) / chunk_bytes;
}

/// Full rings of a block's warps.
FD_HOST_DEVICE constexpr int stream_ring_bytes(int chunk_bytes) {
  return kStreamWarps * kStreamMostStages * stream_copy_chunks(chunk_bytes) * chunk_bytes;
}

/// How a block divides its shared memory.
struct StreamRoom {
  int row_bytes;    // rows of x
  int stages;       // slots of a warp's ring
  int copy_chunks;  // chunks of one bulk copy, which fills a slot
};

/// Room for `wanted` bytes of rows, if a slot of one chunk is left for every warp.
FD_HOST_DEVICE constexpr StreamRoom stream_room(int bytes, int chunk_bytes, int wanted) {
  const int unit = kStreamWarps * chunk_bytes, most = bytes - unit;
  StreamRoom room{wanted < most ? wanted : most, 1, 1};
  const int slots = (bytes - room.row_bytes) / unit;  // of a chunk, for every warp
  const int copy = stream_copy_chunks(chunk_bytes);
  if (slots >= kStreamMostStages) room.stages = kStreamMostStages;
  if (slots >= kStreamMostStages * copy) room.copy_chunks = copy;
  return room;
}

}  // namespace fd::cuda

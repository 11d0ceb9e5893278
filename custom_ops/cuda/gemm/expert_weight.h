// How the experts' weights lie on a card, and the sizes that follow from it; free of device code.
//
// A block is 16 columns of W by all of K; a chunk is 512 rows of a block, contiguous, so that one
// bulk copy of 2 KB and more fetches it: 64 bytes of local scales (CCQ only), then 4 tiles of 128
// rows. In a tile each lane of a warp owns `lane_vectors` 16-byte vectors, stored [vector][lane]:
// lane (g = lane / 4, c = lane % 4) holds columns g and g + 8 and rows 8c .. 8c + 7 of every 32. K
// is padded to whole chunks with weights of zero. Layout: [expert][block][chunk].
//
// Block j of a weight with N columns holds columns 8j .. 8j + 7 as its first eight and
// N / 2 + 8j .. N / 2 + 8j + 7 as its last: of [gate | up], a lane then holds both numbers that
// SwiGLU takes.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fd::cuda {

constexpr int kBlockColumns = 16;
constexpr int kTileK = 128;
constexpr int kChunkTiles = 4;
constexpr int kChunkK = kTileK * kChunkTiles;

/// How an expert's weights are coded.
enum class Coding : int { kCcq = 0, kInt4 = 1, kInt8 = 2 };

constexpr int lane_vectors(Coding coding) {
  return coding == Coding::kCcq ? 1 : coding == Coding::kInt4 ? 2 : 4;
}

constexpr int scale_bytes(Coding coding) { return coding == Coding::kCcq ? 64 : 0; }
constexpr int tile_size(Coding coding) { return 512 * lane_vectors(coding); }
constexpr int chunk_bytes(Coding coding) {
  return scale_bytes(coding) + kChunkTiles * tile_size(coding);
}

/// Constants of one CCQ column for the fast decoder, found and proven by fit_columns(): see
/// decode.cuh. `proven` is 0 where no constants give all 256 codes.
struct ColumnCode {
  uint32_t magic;
  float scale;
  float base;
  uint32_t proven;
};

/// All experts of one weight. Columns of the vectors are in block order.
struct ExpertWeight {
  Coding coding;
  const uint8_t* chunks;
  const ColumnCode* codes;    // CCQ: [experts][blocks][16]
  const float2* exact;        // CCQ: code_scale and code_zp + 0.5, same order
  const float* column_scale;  // [experts][blocks][16]
  int experts;
  int in_features;
  int out_features;
  bool proven;  // every column of every expert

  __host__ __device__ int blocks() const { return out_features / kBlockColumns; }
  __host__ __device__ int chunks_of_k() const { return (in_features + kChunkK - 1) / kChunkK; }
  __host__ __device__ int padded_k() const { return chunks_of_k() * kChunkK; }
};

}  // namespace fd::cuda

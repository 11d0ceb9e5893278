// What the kernels over rows sorted by expert share.
#pragma once

#include "canonical.cuh"
#include "experts.h"
#include "tiles_shape.h"

namespace fd::cuda {

/// One product over sorted rows: out = x W, or swiglu of it.
struct TilesJob {
  ExpertWeight w;
  const __half* x;       // [rows][padded K] in slot order; tall tiles: see tiled_byte()
  const float* x_scale;  // power of two of each row of x
  const int* slot_of_row;
  const int4* tiles;         // {expert, first sorted row, rows, 0}
  const int* tile_counts;    // of tall tiles, which stand first, and of the others
  int* next_items;           // of tall tiles and of others; zero when the job starts
  const int* source_of_row;  // row of x of each sorted row; null: the sorted row itself
  bool gated;                // out [sorted row][N / 2]; otherwise [slot][N]
  __nv_bfloat16* out;
  int arrivals;  // of a warp at a barrier: see warp_arrive()
};

/// `tile_tokens`: no tile has more rows.
void tiles_hopper(const TilesJob& job, int tile_tokens, int multiprocessors, cudaStream_t stream);
/// Whether this build has the kernels of compute capability 9.0; code of an older one that a newer
/// card compiles for itself has none of them.
bool has_hopper_code();
void tiles_plain(const TilesJob& job, int max_tiles, cudaStream_t stream);

/// bf16 rows to float16 times a power of two, in slot order: as ldmatrix and wgmma read them from
/// shared memory (slot s of 32 rows at place s), or eight rows together for mma.sync.
enum class RowOrder : int { kSlots = 0, kEights = 1 };

/// Rows of x for tiles. `source_of_row`: row of x of each row of the output; null: the same.
/// `tile_of_row`: see sort_slots(); null: no tall tiles.
struct RowsJob {
  const __nv_bfloat16* x;
  int rows, width, padded;
  const int* source_of_row;
  const int2* tile_of_row;
  __half* out;
  float* scale;
};
void convert_rows(const RowsJob& job, RowOrder order, cudaStream_t stream);

constexpr int kTiledK = 64;  // of a tall tile's stage

/// Where a tall tile's row has byte `byte` (a multiple of four) of its padded K. A stage of 64 rows
/// of K is one piece, [row][128 bytes] in wgmma's 128-byte swizzle, so that one bulk copy fetches
/// it.
__host__ __device__ constexpr int64_t tiled_byte(int rows, int row, int byte) {
  const int stage = byte / (2 * kTiledK), inside = byte % (2 * kTiledK);
  return int64_t{stage} * rows * (2 * kTiledK) + row * (2 * kTiledK) +
         ((inside / 16 ^ (row & 7)) << 4) + inside % 16;
}

/// Where sort_slots() writes.
struct SortedSlots {
  int* slot_of_row;
  int* token_of_row;  // slot / top_k
  int2* tile_of_row;  // {first row of its tile, rows of it if it is tall, else 0}
  int4* tiles;
  int* counts;  // of tall and of other tiles; the four numbers behind them are zeroed
};
constexpr int kSortCounts = 6;

/// Sorts slots by expert and cuts each expert's rows into tiles of equal height, at most
/// `tile_tokens`; tall tiles stand first.
void sort_slots(const int* ids, int slots, int top_k, int experts, int tile_tokens,
                const SortedSlots& out, cudaStream_t stream);

#ifdef __CUDACC__
__device__ __forceinline__ int source_row(const TilesJob& job, int row) {
  return job.source_of_row != nullptr ? __ldg(job.source_of_row + row) : row;
}
#endif

}  // namespace fd::cuda

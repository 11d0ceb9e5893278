// What the kernels over rows sorted by expert share.
#pragma once

#include "canonical.cuh"
#include "experts.h"

namespace fd::cuda {

/// One product over sorted rows: out = x W, or swiglu of it.
struct TilesJob {
  ExpertWeight w;
  const __half* x;       // [rows][padded K] in slot order
  const float* x_scale;  // power of two of each row of x
  const int* slot_of_row;
  const int4* tiles;         // {expert, first sorted row, rows, 0}
  const int* tile_counts;    // of tall tiles, which stand first, and of the others
  int* next_items;           // of tall tiles and of others; zero when the job starts
  const int* source_of_row;  // row of x of each sorted row; null: the sorted row itself
  bool gated;                // out [sorted row][N / 2]; otherwise [slot][N]
  __nv_bfloat16* out;
};

/// Tiles of an expert whose tiles are higher than this are tall.
constexpr int kShortTile = 64;

/// `tile_tokens`: no tile has more rows.
void tiles_wgmma(const TilesJob& job, int tile_tokens, int multiprocessors, cudaStream_t stream);
/// Whether this build has the kernels of compute capability 9.0; code of an older one that a newer
/// card compiles for itself has none of them.
bool has_hopper_code();
void tiles_plain(const TilesJob& job, int max_tiles, cudaStream_t stream);

/// bf16 rows to float16 times a power of two, in slot order: as wgmma reads them from shared memory
/// (slot s of 32 rows at place s), or eight rows together for mma.sync.
enum class RowOrder : int { kSlots = 0, kEights = 1 };
void convert_rows(const __nv_bfloat16* x, int rows, int width, int padded, RowOrder order,
                  __half* out, float* scale, cudaStream_t stream);

/// Sorts slots by expert and cuts each expert's rows into tiles of equal height, at most
/// `tile_tokens`; tall tiles stand first. `token_of_row` is slot / top_k, `counts` those of tall
/// and of other tiles; the four numbers behind them are zeroed.
constexpr int kSortCounts = 6;
void sort_slots(const int* ids, int slots, int top_k, int experts, int tile_tokens,
                int* slot_of_row, int* token_of_row, int4* tiles, int* counts, cudaStream_t stream);

#ifdef __CUDACC__
__device__ __forceinline__ int source_row(const TilesJob& job, int row) {
  return job.source_of_row != nullptr ? __ldg(job.source_of_row + row) : row;
}
#endif

}  // namespace fd::cuda

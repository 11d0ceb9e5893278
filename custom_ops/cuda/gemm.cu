// Chooses the instance of the tiled product for a kind of weight known at run time.
#include "gemm.h"
#include "weight_tiles.cuh"

namespace fd::cuda {

template <Kind kKind, bool kGated>
void run_gemm(const TiledWeight& w, const GemmParams& p, bool wide, int tile_rows, int row_tiles,
              cudaStream_t stream);

namespace {

template <Kind kKind>
void run(bool gated, const TiledWeight& w, const GemmParams& p, bool wide, int tile_rows,
         int row_tiles, cudaStream_t stream) {
  if (gated) return run_gemm<kKind, true>(w, p, wide, tile_rows, row_tiles, stream);
  return run_gemm<kKind, false>(w, p, wide, tile_rows, row_tiles, stream);
}

}  // namespace

void gemm(int kind, bool gated, const TiledWeight& w, const GemmParams& p, bool wide, int tile_rows,
          int row_tiles, cudaStream_t stream) {
  switch (static_cast<Kind>(kind)) {
    case Kind::kDense:
      return run<Kind::kDense>(gated, w, p, wide, tile_rows, row_tiles, stream);
    case Kind::kInt8:
      return run<Kind::kInt8>(gated, w, p, wide, tile_rows, row_tiles, stream);
    case Kind::kInt4:
      return run<Kind::kInt4>(gated, w, p, wide, tile_rows, row_tiles, stream);
    case Kind::kCcq:
      return run<Kind::kCcq>(gated, w, p, wide, tile_rows, row_tiles, stream);
    case Kind::kCcqWide:
      return run<Kind::kCcqWide>(gated, w, p, wide, tile_rows, row_tiles, stream);
  }
}

}  // namespace fd::cuda

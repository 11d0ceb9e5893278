// Chooses the instance of the tiled product for a kind of weight known at run time; adds up the
// parts of products that blocks have shared.
#include "gemm_rows.cuh"

namespace fd::cuda {

template <Kind kKind, bool kGated>
void run_gemm(const TiledWeight& w, const GemmParams& p, int tile_rows, int row_tiles,
              cudaStream_t stream);

namespace {

constexpr int kFinishThreads = 256;

template <Kind kKind>
void run(bool gated, const TiledWeight& w, const GemmParams& p, int tile_rows, int row_tiles,
         cudaStream_t stream) {
  if (gated) {  // quantised experts have kernels of their own, see gemm/experts.h
    if constexpr (kKind == Kind::kDense) {
      return run_gemm<kKind, true>(w, p, tile_rows, row_tiles, stream);
    }
    throw std::runtime_error("gemm: no fused SwiGLU for weights of kind " +
                             std::to_string(static_cast<int>(kKind)));
  }
  return run_gemm<kKind, false>(w, p, tile_rows, row_tiles, stream);
}

/// One row per blockIdx.y.
__global__ void finish_kernel(const GemmParams p, const float* column_scale, int parts) {
  wait_for_inputs();
  const int column = blockIdx.x * kFinishThreads + threadIdx.x;
  if (column >= p.out_columns) return;
  const int64_t i = int64_t{blockIdx.y} * p.out_columns + column;
  const int64_t count = int64_t{p.rows.count} * p.out_columns;
  float sum = p.partial[i];
  for (int q = 1; q < parts; ++q) sum = __fadd_rn(sum, p.partial[q * count + i]);
  const float scale = column_scale == nullptr ? 1.0f : column_scale[column];
  store_output(p, i, finished<false>(sum, 0.0f, scale, 1.0f));
}

}  // namespace

void finish_parts(const GemmParams& p, const float* column_scale, int parts, cudaStream_t stream) {
  const dim3 grid(ceil_div(p.out_columns, kFinishThreads), p.rows.count);
  launch("finish_parts", finish_kernel, grid, kFinishThreads, 0, stream, p, column_scale, parts);
}

void gemm(int kind, bool gated, const TiledWeight& w, const GemmParams& p, int tile_rows,
          int row_tiles, cudaStream_t stream) {
  switch (static_cast<Kind>(kind)) {
    case Kind::kDense:
      return run<Kind::kDense>(gated, w, p, tile_rows, row_tiles, stream);
    case Kind::kInt8:
      return run<Kind::kInt8>(gated, w, p, tile_rows, row_tiles, stream);
    case Kind::kInt4:
      return run<Kind::kInt4>(gated, w, p, tile_rows, row_tiles, stream);
    case Kind::kCcq:
      return run<Kind::kCcq>(gated, w, p, tile_rows, row_tiles, stream);
    case Kind::kCcqWide:
      return run<Kind::kCcqWide>(gated, w, p, tile_rows, row_tiles, stream);
  }
}

}  // namespace fd::cuda

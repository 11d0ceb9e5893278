// float32 products whose sums run through k in one order on every card: outputs do not depend on
// the card's generation nor on a library's version.
#include "encode.h"
#include "exact.cuh"

namespace fd::cuda {
namespace {

constexpr int kTile = 128;
constexpr int kDepth = 8;
constexpr int kThreads = 256;
constexpr int kOwnRows = 8;  // of a thread, in two runs of four, and as many columns
constexpr int kPad = 4;

/// Four values of row `row` of a matrix from column `column` on; zeros outside.
__device__ __forceinline__ float4 load_four(const float* matrix, int64_t stride, int row, int rows,
                                            int column, int columns) {
  const float* from = matrix + row * stride + column;
  float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  if (row >= rows || column >= columns) return v;
  if (column + 4 <= columns) return *reinterpret_cast<const float4*>(from);
  v.x = from[0];
  if (column + 1 < columns) v.y = from[1];
  if (column + 2 < columns) v.z = from[2];
  return v;
}

struct Tiles {
  float a[2][kDepth][kTile + kPad];
  float b[2][kDepth][kTile];
};

template <bool kTransposed>
__global__ void __launch_bounds__(kThreads) multiply_kernel(Product p) {
  __shared__ Tiles tiles;
  const int first_row = blockIdx.y * kTile, first_column = blockIdx.x * kTile;
  const int thread = threadIdx.x;
  // Loading: each thread four values of a and four of b in every step.
  const int b_row = thread / 32, b_column = thread % 32 * 4;
  const int a_row = thread / 2, a_depth = thread % 2 * 4;
  float4 next_a, next_b;
  const auto fetch = [&](int k) {
    if constexpr (kTransposed) {
      next_a = load_four(p.a, p.lda, k + b_row, p.k, first_row + b_column, p.m);
    } else {
      next_a = load_four(p.a, p.lda, first_row + a_row, p.m, k + a_depth, p.k);
    }
    next_b = load_four(p.b, p.ldb, k + b_row, p.k, first_column + b_column, p.n);
  };
  const auto keep = [&](int side) {
    if constexpr (kTransposed) {
      *reinterpret_cast<float4*>(&tiles.a[side][b_row][b_column]) = next_a;
    } else {
      tiles.a[side][a_depth][a_row] = next_a.x;
      tiles.a[side][a_depth + 1][a_row] = next_a.y;
      tiles.a[side][a_depth + 2][a_row] = next_a.z;
      tiles.a[side][a_depth + 3][a_row] = next_a.w;
    }
    *reinterpret_cast<float4*>(&tiles.b[side][b_row][b_column]) = next_b;
  };
  const int row = thread / 16 * 4, column = thread % 16 * 4;
  float sum[kOwnRows][kOwnRows];
  for (int i = 0; i < kOwnRows; ++i) {
    const int r = first_row + row + i % 4 + i / 4 * (kTile / 2);
    for (int j = 0; j < 2; ++j) {
      const int at = first_column + column + j * (kTile / 2);
      float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (p.accumulate) v = load_four(p.c, p.ldc, r, p.m, at, p.n);
      sum[i][4 * j] = v.x;
      sum[i][4 * j + 1] = v.y;
      sum[i][4 * j + 2] = v.z;
      sum[i][4 * j + 3] = v.w;
    }
  }
  fetch(0);
  keep(0);
  __syncthreads();
  int side = 0;
  for (int k = 0; k < p.k; k += kDepth) {
    const bool more = k + kDepth < p.k;
    if (more) fetch(k + kDepth);
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      float a[kOwnRows], b[kOwnRows];
      for (int i = 0; i < 2; ++i) {
        const float4 x = *reinterpret_cast<float4*>(&tiles.a[side][d][row + i * (kTile / 2)]);
        const float4 y = *reinterpret_cast<float4*>(&tiles.b[side][d][column + i * (kTile / 2)]);
        a[4 * i] = x.x, a[4 * i + 1] = x.y, a[4 * i + 2] = x.z, a[4 * i + 3] = x.w;
        b[4 * i] = y.x, b[4 * i + 1] = y.y, b[4 * i + 2] = y.z, b[4 * i + 3] = y.w;
      }
#pragma unroll
      for (int i = 0; i < kOwnRows; ++i) {
#pragma unroll
        for (int j = 0; j < kOwnRows; ++j) sum[i][j] = __fmaf_rn(a[i], b[j], sum[i][j]);
      }
    }
    if (more) keep(side ^ 1);
    __syncthreads();
    side ^= 1;
  }
  for (int i = 0; i < kOwnRows; ++i) {
    const int r = first_row + row + i % 4 + i / 4 * (kTile / 2);
    if (r >= p.m) continue;
    for (int j = 0; j < 2; ++j) {
      const int at = first_column + column + j * (kTile / 2);
      float* to = p.c + r * p.ldc + at;
      const float4 v =
          make_float4(sum[i][4 * j], sum[i][4 * j + 1], sum[i][4 * j + 2], sum[i][4 * j + 3]);
      if (at < p.n) *reinterpret_cast<float4*>(to) = v;  // n is a multiple of 4
    }
  }
}

}  // namespace

void multiply(const Product& p, cudaStream_t stream) {
  if (p.m == 0 || p.n == 0) return;
  const dim3 grid(ceil_div(p.n, kTile), ceil_div(p.m, kTile));
  const auto kernel = p.transposed ? multiply_kernel<true> : multiply_kernel<false>;
  queue("multiply", kernel, grid, kThreads, stream, p);
}

}  // namespace fd::cuda

// Linear systems of a factorised matrix, H X = B with H = U U', in float64; and SwiGLU.
#include "exact.cuh"
#include "terms.cuh"

namespace fd::cuda {
namespace {

constexpr int kPanel = 64;
constexpr int kThreads = 256;
constexpr int kChunk = 16;

__device__ __forceinline__ int64_t index64() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}

__global__ void __launch_bounds__(kThreads)
    scaled_kernel(const float* from, double divisor, int64_t count, double* to) {
  const int64_t at = index64();
  if (at < count) to[at] = from[at] / divisor;
}

__global__ void __launch_bounds__(kThreads)
    narrow_kernel(const double* from, int64_t count, float* to) {
  const int64_t at = index64();
  if (at < count) to[at] = static_cast<float>(from[at]);
}

/// 64 rows of the right-hand side, a thread a column: U x = b from the last row up, or U' x = b
/// from the first row down.
template <bool kTransposed>
__global__ void __launch_bounds__(kPanel)
    substitute_kernel(const double* upper, int64_t size, double* right, int columns) {
  __shared__ double x[kPanel][kPanel];
  const int column = blockIdx.x * kPanel + threadIdx.x;
  if (column >= columns) return;
  for (int i = 0; i < kPanel; ++i) {
    const int row = kTransposed ? i : kPanel - 1 - i;
    double sum = right[static_cast<int64_t>(row) * columns + column];
    for (int j = 0; j < i; ++j) {
      const int other = kTransposed ? j : kPanel - 1 - j;
      const double factor = kTransposed ? upper[other * size + row] : upper[row * size + other];
      sum -= factor * x[other][threadIdx.x];
    }
    sum /= upper[row * size + row];
    x[row][threadIdx.x] = sum;
    right[static_cast<int64_t>(row) * columns + column] = sum;
  }
}

/// right [64 rows of tile y, ...] -= factors solved, with the solved 64 rows [64, columns]; factors
/// are U's 64 columns, or the transpose of U's 64 rows.
template <bool kTransposed>
__global__ void __launch_bounds__(kThreads)
    eliminate_kernel(const double* factors, int64_t size, const double* solved, double* right,
                     int columns) {
  __shared__ double left[kChunk][kPanel + 1], inner[kChunk][kPanel];
  const int64_t first_row = static_cast<int64_t>(blockIdx.y) * kPanel;
  const int first_column = blockIdx.x * kPanel;
  const int row = threadIdx.x / 16 * 4, column = threadIdx.x % 16;
  double sum[4][4] = {};
  for (int k = 0; k < kPanel; k += kChunk) {
    for (int i = threadIdx.x; i < kPanel * kChunk; i += kThreads) {
      if constexpr (kTransposed) {
        left[i / kPanel][i % kPanel] = factors[(k + i / kPanel) * size + first_row + i % kPanel];
      } else {
        left[i % kChunk][i / kChunk] = factors[(first_row + i / kChunk) * size + k + i % kChunk];
      }
      const int at = first_column + i % kPanel;
      inner[i / kPanel][i % kPanel] =
          at < columns ? solved[static_cast<int64_t>(k + i / kPanel) * columns + at] : 0.0;
    }
    __syncthreads();
#pragma unroll
    for (int d = 0; d < kChunk; ++d) {
      double a[4], b[4];
      for (int i = 0; i < 4; ++i) a[i] = left[d][row + i], b[i] = inner[d][column + 16 * i];
      for (int i = 0; i < 4; ++i) {
        for (int j = 0; j < 4; ++j) sum[i][j] += a[i] * b[j];
      }
    }
    __syncthreads();
  }
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < 4; ++j) {
      const int at = first_column + column + 16 * j;
      if (at < columns) right[(first_row + row + i) * columns + at] -= sum[i][j];
    }
  }
}

/// silu(gate) * up of [T, 2 I], the gate first, times a weight a row.
__global__ void __launch_bounds__(kThreads)
    swiglu_kernel(const float* both, const float* weight, int64_t count, int width, float* out) {
  const int64_t at = index64();
  if (at >= count) return;
  const int64_t row = at / width, column = at % width;
  const float gate = both[row * 2 * width + column], up = both[(row * 2 + 1) * width + column];
  out[at] = gate / (1.0f + expf(-gate)) * up * weight[row];
}

dim3 for_threads(int64_t count) {
  return dim3(static_cast<unsigned>(ceil_div<int64_t>(count, kThreads)));
}

}  // namespace

void solve(const double* upper, int size, const float* right, double divisor, int columns,
           double* wide, float* solution, cudaStream_t stream) {
  const int64_t count = int64_t{size} * columns, panel_values = int64_t{kPanel} * columns;
  const int across = ceil_div(columns, kPanel), panels = size / kPanel;
  const auto diagonal = [&](int panel) { return upper + int64_t{panel} * kPanel * (size + 1); };
  queue("solve: widen", scaled_kernel, for_threads(count), kThreads, stream, right, divisor, count,
        wide);
  for (int panel = panels - 1; panel >= 0; --panel) {
    double* own = wide + panel * panel_values;
    queue("solve: up", substitute_kernel<false>, dim3(across), kPanel, stream, diagonal(panel),
          int64_t{size}, own, columns);
    if (panel == 0) break;
    queue("solve: above", eliminate_kernel<false>, dim3(across, panel), kThreads, stream,
          upper + panel * kPanel, int64_t{size}, own, wide, columns);
  }
  for (int panel = 0; panel < panels; ++panel) {
    double* own = wide + panel * panel_values;
    queue("solve: down", substitute_kernel<true>, dim3(across), kPanel, stream, diagonal(panel),
          int64_t{size}, own, columns);
    if (panel + 1 == panels) break;
    queue("solve: below", eliminate_kernel<true>, dim3(across, panels - panel - 1), kThreads,
          stream, diagonal(panel) + kPanel, int64_t{size}, own, own + panel_values, columns);
  }
  queue("solve: narrow", narrow_kernel, for_threads(count), kThreads, stream, wide, count,
        solution);
}

void swiglu(const float* both, const float* weight, int tokens, int width, float* out,
            cudaStream_t stream) {
  const int64_t count = int64_t{tokens} * width;
  if (count == 0) return;
  queue("swiglu", swiglu_kernel, for_threads(count), kThreads, stream, both, weight, count, width,
        out);
}

}  // namespace fd::cuda

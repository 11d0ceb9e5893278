#include "exact.cuh"
#include "terms.cuh"

namespace fd::cuda {
namespace {

constexpr int kPanel = 64;
constexpr int kThreads = 256;
constexpr int kChunk = 16;  // of a panel's columns in shared memory at once
constexpr int kBlock = 4;   // rows of a codeword
constexpr int kNotFinite = 1, kNotPositive = 2;

__device__ __forceinline__ int64_t index64() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}

__device__ __forceinline__ double mixed_at(const float* first, double first_share,
                                           const float* second, double second_share, int64_t at) {
  double sum = 0.0;
  if (first != nullptr) sum = __dadd_rn(sum, __dmul_rn(first[at], first_share));
  if (second != nullptr) sum = __dadd_rn(sum, __dmul_rn(second[at], second_share));
  return sum;
}

__global__ void __launch_bounds__(kThreads)
    mean_kernel(const float* first, double first_share, const float* second, double second_share,
                int size, double* mean, int* status) {
  __shared__ double parts[kThreads];
  double sum = 0.0;
  for (int i = threadIdx.x; i < size; i += kThreads) {
    sum += mixed_at(first, first_share, second, second_share, static_cast<int64_t>(i) * (size + 1));
  }
  parts[threadIdx.x] = sum;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) parts[threadIdx.x] += parts[threadIdx.x + half];
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    *mean = parts[0] / size;
    if (!isfinite(*mean)) *status = kNotFinite;
  }
}

__global__ void __launch_bounds__(kThreads)
    blend_kernel(const float* first, double first_share, const float* second, double second_share,
                 int size, double damping, const double* mean, float* mixed) {
  const int64_t at = index64();
  if (at >= static_cast<int64_t>(size) * size) return;
  const bool diagonal = at % (size + 1) == 0;
  if (*mean <= 0.0) {
    mixed[at] = diagonal ? 1.0f : 0.0f;
    return;
  }
  const double value = mixed_at(first, first_share, second, second_share, at) / *mean;
  mixed[at] = static_cast<float>(diagonal ? __dadd_rn(value, damping) : value);
}

__global__ void __launch_bounds__(kThreads)
    widen_kernel(const float* hessian, int64_t count, double* wide) {
  const int64_t at = index64();
  if (at < count) wide[at] = hessian[at];
}

/// The diagonal block [64, 64] of one panel, in place.
__global__ void __launch_bounds__(kThreads)
    diagonal_kernel(double* block, int64_t stride, int* status) {
  __shared__ double a[kPanel][kPanel + 1];
  for (int i = threadIdx.x; i < kPanel * kPanel; i += kThreads) {
    a[i / kPanel][i % kPanel] = block[i / kPanel * stride + i % kPanel];
  }
  __syncthreads();
  for (int c = kPanel - 1; c >= 0; --c) {
    const double pivot = a[c][c];
    if (threadIdx.x == 0 && !(pivot > 0.0)) *status = kNotPositive;
    const double root = sqrt(pivot > 0.0 ? pivot : 1.0);
    __syncthreads();
    if (threadIdx.x <= c) a[threadIdx.x][c] = threadIdx.x == c ? root : a[threadIdx.x][c] / root;
    __syncthreads();
    for (int i = threadIdx.x; i < c * kPanel; i += kThreads) {
      const int row = i / kPanel, column = i % kPanel;
      if (column >= row && column < c) a[row][column] -= a[row][c] * a[column][c];
    }
    __syncthreads();
  }
  for (int i = threadIdx.x; i < kPanel * kPanel; i += kThreads) {
    block[i / kPanel * stride + i % kPanel] = a[i / kPanel][i % kPanel];
  }
}

/// Rows above a diagonal block U: each x of x U' = a, one thread a row.
__global__ void __launch_bounds__(kPanel)
    panel_kernel(double* above, const double* upper, int64_t stride) {
  __shared__ double x[kPanel][kPanel + 1];  // by column
  double* block = above + static_cast<int64_t>(blockIdx.x) * kPanel * stride;
  for (int row = 0; row < kPanel; ++row) x[threadIdx.x][row] = block[row * stride + threadIdx.x];
  __syncthreads();
  for (int c = kPanel - 1; c >= 0; --c) {
    double sum = x[c][threadIdx.x];
    for (int d = c + 1; d < kPanel; ++d) sum -= x[d][threadIdx.x] * upper[c * stride + d];
    x[c][threadIdx.x] = sum / upper[c * stride + c];
  }
  __syncthreads();
  for (int row = 0; row < kPanel; ++row) block[row * stride + threadIdx.x] = x[threadIdx.x][row];
}

/// Tile (y, x) of the rows above, x >= y, less the product of its panels' blocks.
__global__ void __launch_bounds__(kThreads)
    trailing_kernel(double* matrix, const double* panel, int64_t stride) {
  if (blockIdx.x < blockIdx.y) return;
  __shared__ double left[kChunk][kPanel], right[kChunk][kPanel + 1];
  const int64_t first_row = static_cast<int64_t>(blockIdx.y) * kPanel;
  const int64_t first_column = static_cast<int64_t>(blockIdx.x) * kPanel;
  const int row = threadIdx.x / 16 * 4, column = threadIdx.x % 16;
  double sum[4][4] = {};
  for (int k = 0; k < kPanel; k += kChunk) {
    for (int i = threadIdx.x; i < kPanel * kChunk; i += kThreads) {
      left[i % kChunk][i / kChunk] = panel[(first_row + i / kChunk) * stride + k + i % kChunk];
      right[i % kChunk][i / kChunk] = panel[(first_column + i / kChunk) * stride + k + i % kChunk];
    }
    __syncthreads();
#pragma unroll
    for (int d = 0; d < kChunk; ++d) {
      double a[4], b[4];
      for (int i = 0; i < 4; ++i) a[i] = left[d][row + i], b[i] = right[d][column + 16 * i];
      for (int i = 0; i < 4; ++i) {
        for (int j = 0; j < 4; ++j) sum[i][j] += a[i] * b[j];
      }
    }
    __syncthreads();
  }
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < 4; ++j) {
      matrix[(first_row + row + i) * stride + first_column + column + 16 * j] -= sum[i][j];
    }
  }
}

/// Inverse of a positive definite or upper triangular 4 x 4 matrix, without pivots.
__device__ void invert(const double (&matrix)[kBlock][kBlock], double (&inverse)[kBlock][kBlock]) {
  double a[kBlock][kBlock];
  for (int i = 0; i < kBlock; ++i) {
    for (int j = 0; j < kBlock; ++j) a[i][j] = matrix[i][j], inverse[i][j] = i == j ? 1.0 : 0.0;
  }
  for (int p = 0; p < kBlock; ++p) {
    const double scale = 1.0 / a[p][p];
    for (int j = 0; j < kBlock; ++j) a[p][j] *= scale, inverse[p][j] *= scale;
    for (int i = 0; i < kBlock; ++i) {
      const double times = a[i][p];
      if (i == p) continue;
      for (int j = 0; j < kBlock; ++j) {
        a[i][j] -= times * a[p][j];
        inverse[i][j] -= times * inverse[p][j];
      }
    }
  }
}

/// One thread for four columns of a row; the diagonal blocks also give the metric.
__global__ void __launch_bounds__(kThreads)
    elimination_kernel(const double* upper, int size, float* metric, float* feedback) {
  const int blocks = size / kBlock, block = index64() % blocks;
  const int64_t row = index64() / blocks;
  if (row >= size) return;
  const double* at = upper + static_cast<int64_t>(block) * kBlock * (size + 1);
  double own[kBlock][kBlock], inverse[kBlock][kBlock];
  for (int i = 0; i < kBlock; ++i) {
    for (int j = 0; j < kBlock; ++j)
      own[i][j] = j >= i ? at[static_cast<int64_t>(i) * size + j] : 0.0;
  }
  invert(own, inverse);
  float result[kBlock] = {};
  if (row / kBlock < block) {
    for (int j = 0; j < kBlock; ++j) {
      double sum = 0.0;
      for (int i = 0; i < kBlock; ++i)
        sum += upper[row * size + block * kBlock + i] * inverse[i][j];
      result[j] = static_cast<float>(sum);
    }
  }
  reinterpret_cast<float4*>(feedback + row * size)[block] =
      make_float4(result[0], result[1], result[2], result[3]);
  if (row / kBlock == block) {
    const int i = static_cast<int>(row % kBlock);
    for (int j = 0; j < kBlock; ++j) {
      double sum = 0.0;
      for (int k = 0; k < kBlock; ++k) sum += own[i][k] * own[j][k];
      metric[block * 16 + i * kBlock + j] = static_cast<float>(sum);
    }
  }
}

/// One thread for four columns of a row of a group.
__global__ void __launch_bounds__(kThreads)
    descent_kernel(const float* hessian, int size, float* metric, float* inverse, float* feedback) {
  const int64_t row = index64() / kGroupBlocks;
  if (row >= size) return;
  const int inside = index64() % kGroupBlocks;
  const int64_t group = row / kGroupRows, block = group * kGroupBlocks + inside;
  double own[kBlock][kBlock], inverted[kBlock][kBlock];
  for (int i = 0; i < kBlock; ++i) {
    for (int j = 0; j < kBlock; ++j) {
      own[i][j] = hessian[(block * kBlock + i) * size + block * kBlock + j];
    }
  }
  invert(own, inverted);
  const bool diagonal = row / kBlock == block;
  const int i = static_cast<int>(row % kBlock);
  float result[kBlock];
  for (int j = 0; j < kBlock; ++j) {
    double sum = 0.0;
    for (int k = 0; k < kBlock; ++k)
      sum += hessian[row * size + block * kBlock + k] * inverted[k][j];
    result[j] = diagonal ? 0.0f : static_cast<float>(sum);
    if (diagonal) {
      metric[block * 16 + i * kBlock + j] = static_cast<float>(own[i][j]);
      inverse[block * 16 + i * kBlock + j] = static_cast<float>(inverted[i][j]);
    }
  }
  reinterpret_cast<float4*>(feedback + row * kGroupRows)[inside] =
      make_float4(result[0], result[1], result[2], result[3]);
}

__global__ void __launch_bounds__(kThreads)
    permute_kernel(const float* from, const int* row_of, int64_t size, float* to) {
  const int64_t at = index64(), row = at / size, column = at % size;
  if (row >= size) return;
  const auto place = [row_of](int64_t i) {
    return i / kGroupRows * kGroupRows + row_of[i % kGroupRows];
  };
  to[at] = from[place(row) * size + place(column)];
}

/// Sums of every gridDim.x-th run of values, or of `parts`.
__global__ void __launch_bounds__(kThreads)
    inner_kernel(const float* a, const float* b, int64_t count, const double* parts, double* out) {
  __shared__ double sums[kThreads];
  double sum = 0.0;
  for (int64_t i = index64(); i < count; i += static_cast<int64_t>(gridDim.x) * kThreads) {
    sum += parts != nullptr ? parts[i] : static_cast<double>(a[i]) * b[i];
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    __syncthreads();
  }
  if (threadIdx.x == 0) out[blockIdx.x] = sums[0];
}

dim3 for_threads(int64_t count) {
  return dim3(static_cast<unsigned>(ceil_div<int64_t>(count, kThreads)));
}

}  // namespace

void blend_moments(const float* first, double first_share, const float* second, double second_share,
                   int size, double damping, double* mean, float* mixed, int* status,
                   cudaStream_t stream) {
  queue("mean", mean_kernel, dim3(1), kThreads, stream, first, first_share, second, second_share,
        size, mean, status);
  queue("blend", blend_kernel, for_threads(int64_t{size} * size), kThreads, stream, first,
        first_share, second, second_share, size, damping, mean, mixed);
}

void factorize(const float* hessian, int size, double* wide, int* status, cudaStream_t stream) {
  const int64_t count = int64_t{size} * size;
  queue("widen", widen_kernel, for_threads(count), kThreads, stream, hessian, count, wide);
  for (int panel = size / kPanel - 1; panel >= 0; --panel) {
    double* above = wide + panel * kPanel;
    double* block = above + int64_t{panel} * kPanel * size;
    queue("diagonal", diagonal_kernel, dim3(1), kThreads, stream, block, int64_t{size}, status);
    if (panel == 0) break;
    queue("panel", panel_kernel, dim3(panel), kPanel, stream, above, block, int64_t{size});
    queue("trailing", trailing_kernel, dim3(panel, panel), kThreads, stream, wide, above,
          int64_t{size});
  }
}

void elimination_terms(const double* upper, int size, float* metric, float* feedback,
                       cudaStream_t stream) {
  queue("elimination_terms", elimination_kernel, for_threads(int64_t{size} * (size / kBlock)),
        kThreads, stream, upper, size, metric, feedback);
}

void descent_terms(const float* hessian, int size, float* metric, float* inverse, float* feedback,
                   cudaStream_t stream) {
  queue("descent_terms", descent_kernel, for_threads(int64_t{size} * kGroupBlocks), kThreads,
        stream, hessian, size, metric, inverse, feedback);
}

void permute_moments(const float* from, const int* row_of, int size, float* to,
                     cudaStream_t stream) {
  queue("permute_moments", permute_kernel, for_threads(int64_t{size} * size), kThreads, stream,
        from, row_of, int64_t{size}, to);
}

void inner_product(const float* a, const float* b, int64_t count, double* parts, double* total,
                   cudaStream_t stream) {
  const double* none = nullptr;
  queue("inner_product", inner_kernel, dim3(kInnerParts), kThreads, stream, a, b, count, none,
        parts);
  queue("inner_product", inner_kernel, dim3(1), kThreads, stream, a, b, int64_t{kInnerParts}, parts,
        total);
}

}  // namespace fd::cuda

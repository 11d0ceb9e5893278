// What is left to a card when the ranks' numbers have come: adding them in order, placing columns.
#include "common.cuh"
#include "eight_sums.cuh"
#include "nccl.h"

namespace fd::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kVector = 8;  // bf16 in 16 bytes
constexpr unsigned kMostBlocks = 2048;

__global__ void sum_bf16_kernel(const uint4* parts, int ranks, int64_t vectors, uint4* out) {
  wait_for_inputs();
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < vectors; i += step) {
    EightSums sum(parts[i]);
    for (int rank = 1; rank < ranks; ++rank) sum.add(parts[rank * vectors + i]);
    out[i] = sum.rounded();
  }
}

template <typename T>
__global__ void sum_kernel(const T* parts, int ranks, int64_t count, T* out) {
  wait_for_inputs();
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += step) {
    float sum = static_cast<float>(parts[i]);
    for (int rank = 1; rank < ranks; ++rank) sum += static_cast<float>(parts[rank * count + i]);
    out[i] = static_cast<T>(sum);
  }
}

__global__ void side_by_side_kernel(const float* parts, int ranks, int64_t rows, int64_t width,
                                    float* out) {
  wait_for_inputs();
  const int64_t row = blockIdx.y;
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int rank = 0; rank < ranks; ++rank) {
    const float* from = parts + (rank * rows + row) * width;
    float* to = out + (row * ranks + rank) * width;
    for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < width; i += step) {
      to[i] = from[i];
    }
  }
}

unsigned blocks_of(int64_t work) {
  const int64_t wanted = ceil_div<int64_t>(work, kThreads);
  return wanted < kMostBlocks ? static_cast<unsigned>(wanted) : kMostBlocks;
}

}  // namespace

void sum_of_ranks(const void* parts, bool is_float, int ranks, int64_t count, void* out,
                  cudaStream_t stream) {
  const bool is_aligned = reinterpret_cast<uintptr_t>(out) % 16 == 0;
  if (is_float) {
    launch("sum_of_ranks", sum_kernel<float>, blocks_of(count), kThreads, 0, stream,
           static_cast<const float*>(parts), ranks, count, static_cast<float*>(out));
  } else if (count % kVector == 0 && is_aligned) {
    launch("sum_of_ranks", sum_bf16_kernel, blocks_of(count / kVector), kThreads, 0, stream,
           static_cast<const uint4*>(parts), ranks, count / kVector, static_cast<uint4*>(out));
  } else {
    launch("sum_of_ranks", sum_kernel<bf16>, blocks_of(count), kThreads, 0, stream,
           static_cast<const bf16*>(parts), ranks, count, static_cast<bf16*>(out));
  }
}

void side_by_side(const float* parts, int ranks, int64_t rows, int64_t width, float* out,
                  cudaStream_t stream) {
  const dim3 grid(blocks_of(width), static_cast<unsigned>(rows));
  launch("side_by_side", side_by_side_kernel, grid, kThreads, 0, stream, parts, ranks, rows, width,
         out);
}

}  // namespace fd::cuda

// Before the products over sorted rows: slots in order of their experts, rows as float16.
#include "jobs.cuh"

namespace fd::cuda {
namespace {

constexpr int kMaxExperts = 1024;
constexpr int kConvertThreads = 256;

/// Sum of `mine` over the lanes below and this one.
__device__ __forceinline__ int running_sum(int mine) {
  for (int offset = 1; offset < kWarp; offset <<= 1) {
    const int below = __shfl_up_sync(kFullMask, mine, offset);
    if (static_cast<int>(threadIdx.x) >= offset) mine += below;
  }
  return mine;
}

/// How an expert's rows are cut.
struct Cut {
  int tiles, height;

  __device__ Cut(int rows, int tile_tokens) : tiles(ceil_div(rows, tile_tokens)), height(0) {
    if (tiles > 0) height = ceil_div(ceil_div(rows, tiles), 8) * 8;
  }
  __device__ bool tall() const { return height > kShortTile; }
};

/// Where each expert's rows and tiles begin; one warp, 32 experts at a time.
__device__ void place_experts(const int* count, int experts, int tile_tokens, int* first_row,
                              int* first_tile, int* tile_counts) {
  int rows = 0, tall = 0, low = 0;
  for (int base = 0; base < experts; base += kWarp) {
    const int e = base + threadIdx.x, mine = e < experts ? count[e] : 0;
    const Cut cut(mine, tile_tokens);
    const int my_tall = cut.tall() ? cut.tiles : 0, my_low = cut.tiles - my_tall;
    const int row_sum = running_sum(mine), tall_sum = running_sum(my_tall);
    const int low_sum = running_sum(my_low);
    if (e < experts) {
      first_row[e] = rows + row_sum - mine;
      first_tile[e] = cut.tall() ? tall + tall_sum - my_tall : low + low_sum - my_low;
    }
    rows += __shfl_sync(kFullMask, row_sum, kWarp - 1);
    tall += __shfl_sync(kFullMask, tall_sum, kWarp - 1);
    low += __shfl_sync(kFullMask, low_sum, kWarp - 1);
  }
  if (threadIdx.x == 0) {
    tile_counts[0] = tall;
    tile_counts[1] = low;
  }
}

/// One block. The order of rows inside an expert is free: a row's result depends on the row alone.
__global__ void sort_kernel(const int* ids, int slots, int top_k, int experts, int tile_tokens,
                            int* slot_of_row, int* token_of_row, int4* tiles, int* counts) {
  __shared__ int count[kMaxExperts], first_row[kMaxExperts], first_tile[kMaxExperts];
  __shared__ int tile_counts[2];
  for (int e = threadIdx.x; e < experts; e += blockDim.x) count[e] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < slots; i += blockDim.x) atomicAdd(&count[ids[i]], 1);
  __syncthreads();
  if (threadIdx.x < kWarp) {
    place_experts(count, experts, tile_tokens, first_row, first_tile, tile_counts);
  }
  __syncthreads();
  if (threadIdx.x < kSortCounts)
    counts[threadIdx.x] = threadIdx.x < 2 ? tile_counts[threadIdx.x] : 0;
  for (int e = threadIdx.x; e < experts; e += blockDim.x) {
    const Cut cut(count[e], tile_tokens);
    const int first = first_tile[e] + (cut.tall() ? 0 : tile_counts[0]);
    for (int t = 0; t < cut.tiles; ++t) {
      const int begin = t * cut.height;
      tiles[first + t] = make_int4(e, first_row[e] + begin, min(cut.height, count[e] - begin), 0);
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < slots; i += blockDim.x) {
    const int row = atomicAdd(&first_row[ids[i]], 1);
    slot_of_row[row] = i;
    token_of_row[row] = i / top_k;
  }
}

/// One block a row.
template <RowOrder kOrder>
__global__ void __launch_bounds__(kConvertThreads)
    convert_kernel(const bf16* x, int width, int padded, __half* out, float* scale) {
  __shared__ float tops[kConvertThreads / kWarp];
  const int64_t row = blockIdx.x;
  const uint4* from = reinterpret_cast<const uint4*>(x + row * width);
  float top = 0.0f;
  for (int i = threadIdx.x; i < width / 8; i += kConvertThreads) {
    top = fmaxf(top, largest_of(__ldg(from + i)));
  }
  top = warp_max(top);
  if (threadIdx.x % kWarp == 0) tops[threadIdx.x / kWarp] = top;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kConvertThreads / kWarp; ++i) top = fmaxf(top, tops[i]);
  const float factor = row_scale(top);
  if (threadIdx.x == 0) scale[row] = factor;
  uint32_t* to = reinterpret_cast<uint32_t*>(out + row * padded);
  for (int i = threadIdx.x; i < padded / 8; i += kConvertThreads) {
    const uint4 v = to_slots(i < width / 8 ? __ldg(from + i) : make_uint4(0, 0, 0, 0), factor);
    if constexpr (kOrder == RowOrder::kEights) {
      reinterpret_cast<uint4*>(to)[i] = v;
    } else {
      uint32_t* at = to + i / 4 * 16 + i % 4;
      at[0] = v.x;
      at[4] = v.y;
      at[8] = v.z;
      at[12] = v.w;
    }
  }
}

}  // namespace

void sort_slots(const int* ids, int slots, int top_k, int experts, int tile_tokens,
                int* slot_of_row, int* token_of_row, int4* tiles, int* counts,
                cudaStream_t stream) {
  if (experts > kMaxExperts) {
    throw std::runtime_error("sort_slots: " + std::to_string(experts) + " experts exceed 1024");
  }
  sort_kernel<<<1, 1024, 0, stream>>>(ids, slots, top_k, experts, tile_tokens, slot_of_row,
                                      token_of_row, tiles, counts);
  check_launch("sort_slots");
}

void convert_rows(const bf16* x, int rows, int width, int padded, RowOrder order, __half* out,
                  float* scale, cudaStream_t stream) {
  if (rows == 0) return;
  auto kernel = order == RowOrder::kSlots ? convert_kernel<RowOrder::kSlots>
                                          : convert_kernel<RowOrder::kEights>;
  kernel<<<rows, kConvertThreads, 0, stream>>>(x, width, padded, out, scale);
  check_launch("convert_rows");
}

}  // namespace fd::cuda

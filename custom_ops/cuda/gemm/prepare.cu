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
  __device__ bool tall() const { return height > kMostShortRows; }
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
                            const SortedSlots out) {
  __shared__ int count[kMaxExperts], first_row[kMaxExperts], first_tile[kMaxExperts];
  __shared__ int used[kMaxExperts];
  __shared__ int tile_counts[2];
  for (int e = threadIdx.x; e < experts; e += blockDim.x) count[e] = used[e] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < slots; i += blockDim.x) atomicAdd(&count[ids[i]], 1);
  __syncthreads();
  if (threadIdx.x < kWarp) {
    place_experts(count, experts, tile_tokens, first_row, first_tile, tile_counts);
  }
  __syncthreads();
  if (threadIdx.x < kSortCounts) {
    out.counts[threadIdx.x] = threadIdx.x < 2 ? tile_counts[threadIdx.x] : 0;
  }
  for (int e = threadIdx.x; e < experts; e += blockDim.x) {
    const Cut cut(count[e], tile_tokens);
    const int first = first_tile[e] + (cut.tall() ? 0 : tile_counts[0]);
    for (int t = 0; t < cut.tiles; ++t) {
      const int begin = t * cut.height;
      out.tiles[first + t] =
          make_int4(e, first_row[e] + begin, min(cut.height, count[e] - begin), 0);
    }
  }
  for (int i = threadIdx.x; i < slots; i += blockDim.x) {
    const int e = ids[i], inside = atomicAdd(&used[e], 1), row = first_row[e] + inside;
    const Cut cut(count[e], tile_tokens);
    const int begin = inside / cut.height * cut.height;
    out.slot_of_row[row] = i;
    out.token_of_row[row] = i / top_k;
    out.tile_of_row[row] = make_int2(first_row[e] + begin, min(cut.height, count[e] - begin));
  }
}

/// One block a row.
template <RowOrder kOrder>
__global__ void __launch_bounds__(kConvertThreads) convert_kernel(const RowsJob job) {
  __shared__ float tops[kConvertThreads / kWarp];
  const int row = blockIdx.x;
  const int64_t source = job.source_of_row != nullptr ? job.source_of_row[row] : row;
  const uint4* from = reinterpret_cast<const uint4*>(job.x + source * job.width);
  float top = 0.0f;
  for (int i = threadIdx.x; i < job.width / 8; i += kConvertThreads) {
    top = fmaxf(top, largest_of(__ldg(from + i)));
  }
  top = warp_max(top);
  if (threadIdx.x % kWarp == 0) tops[threadIdx.x / kWarp] = top;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kConvertThreads / kWarp; ++i) top = fmaxf(top, tops[i]);
  const float factor = row_scale(top);
  if (threadIdx.x == 0) job.scale[row] = factor;
  const int2 tile = job.tile_of_row != nullptr ? job.tile_of_row[row] : make_int2(0, 0);
  const int first = tile.y > 0 ? tile.x : row;
  uint8_t* to = reinterpret_cast<uint8_t*>(job.out + int64_t{first} * job.padded);
  for (int i = threadIdx.x; i < job.padded / 8; i += kConvertThreads) {
    const uint4 v = to_slots(i < job.width / 8 ? __ldg(from + i) : make_uint4(0, 0, 0, 0), factor);
    if constexpr (kOrder == RowOrder::kEights) {
      reinterpret_cast<uint4*>(to)[i] = v;
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int byte = i / 4 * 64 + j * 16 + i % 4 * 4;
        const int64_t at = tile.y > 0 ? tiled_byte(tile.y, row - first, byte) : byte;
        *reinterpret_cast<uint32_t*>(to + at) = word_of(v, j);
      }
    }
  }
}

}  // namespace

void sort_slots(const int* ids, int slots, int top_k, int experts, int tile_tokens,
                const SortedSlots& out, cudaStream_t stream) {
  if (experts > kMaxExperts) {
    throw std::runtime_error("sort_slots: " + std::to_string(experts) + " experts exceed 1024");
  }
  sort_kernel<<<1, 1024, 0, stream>>>(ids, slots, top_k, experts, tile_tokens, out);
  check_launch("sort_slots");
}

void convert_rows(const RowsJob& job, RowOrder order, cudaStream_t stream) {
  if (job.rows == 0) return;
  auto kernel = order == RowOrder::kSlots ? convert_kernel<RowOrder::kSlots>
                                          : convert_kernel<RowOrder::kEights>;
  kernel<<<job.rows, kConvertThreads, 0, stream>>>(job);
  check_launch("convert_rows");
}

}  // namespace fd::cuda

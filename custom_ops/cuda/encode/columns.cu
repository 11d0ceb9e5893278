#include "columns.cuh"
#include "exact.cuh"

namespace fd::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kSide = 32;
constexpr int kTops = 29;          // super scales that are tried: largest local 15, 14.75 ... 8
constexpr int kLeastSuper = -126;  // exponent of the smallest super scale that is not zero
constexpr uint32_t kLargestMagnitude = 0x7e800000u;  // 2^126: a codeword may overshoot

template <typename T>
__device__ __forceinline__ float widen(T value);
template <>
__device__ __forceinline__ float widen(float value) {
  return value;
}
template <>
__device__ __forceinline__ float widen(uint16_t bits) {
  return __uint_as_float(static_cast<uint32_t>(bits) << 16);
}

__device__ __forceinline__ int thread_index() { return blockIdx.x * blockDim.x + threadIdx.x; }

__device__ __forceinline__ double floor_of(int exponent) {
  return ldexp(1.0, kLeastSuper - exponent);
}

__global__ void __launch_bounds__(16) identity_kernel(float* metric) {
  metric[threadIdx.x] = threadIdx.x % 5 == 0 ? 1.0f : 0.0f;
}

/// 32 columns and 8 runs of rows a block.
template <typename T>
__global__ void __launch_bounds__(kSide * 8)
    column_peaks_kernel(const T* weight, int rows, int columns, int* exponent) {
  __shared__ uint32_t peaks[8][kSide];
  const int lane = threadIdx.x % kSide, run = threadIdx.x / kSide;
  const int n = blockIdx.x * kSide + lane;
  uint32_t peak = 0;  // magnitudes as integers, in whose order NaN is the largest
  if (n < columns) {
    for (int k = run; k < rows; k += 8) {
      const float value = widen(weight[static_cast<int64_t>(k) * columns + n]);
      peak = max(peak, __float_as_uint(value) & 0x7fffffffu);
    }
  }
  peaks[run][lane] = peak;
  __syncthreads();
  if (run == 0 && n < columns) {
    for (int i = 1; i < 8; ++i) peak = max(peak, peaks[i][lane]);
    int power = 0;
    if (peak > 0) frexp(static_cast<double>(__uint_as_float(peak)), &power);
    exponent[n] = peak > kLargestMagnitude ? kBadColumn : power;
  }
}

template <typename T>
__global__ void __launch_bounds__(kSide * 8)
    scale_columns_kernel(const T* weight, const int* row_of, int rows, int columns,
                         const int* exponent, float* scaled) {
  __shared__ float tile[kSide][kSide + 1];
  const int lane = threadIdx.x % kSide, run = threadIdx.x / kSide;
  const int n = blockIdx.x * kSide + lane, first = blockIdx.y * kSide;
  const int power = n < columns ? -exponent[n] : 0;
  for (int i = run; i < kSide; i += 8) {
    int k = first + i;
    if (row_of != nullptr) k = k / kGroupRows * kGroupRows + row_of[k % kGroupRows];
    if (n < columns) {
      const float value = widen(weight[static_cast<int64_t>(k) * columns + n]);
      tile[i][lane] = static_cast<float>(ldexp(static_cast<double>(value), power));
    }
  }
  __syncthreads();
  for (int i = run; i < kSide; i += 8) {
    const int column = blockIdx.x * kSide + i;
    if (column < columns) {
      scaled[static_cast<int64_t>(column) * rows + first + lane] = tile[lane][i];
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    measure_groups_kernel(const float* weight, int columns, int groups, const float* metric,
                          double* rms, double* energy) {
  const int at = thread_index();
  if (at >= columns * groups) return;
  const float* x = weight + static_cast<int64_t>(at) * kGroupRows;
  const auto square = [x](int i) { return __dmul_rn(x[i], x[i]); };
  const double sum = pairwise_sum(square, 0, kGroupRows);
  rms[at] = sqrt(sum / kGroupRows);
  if (energy == nullptr) return;
  double total = sum;
  if (metric != nullptr) {
    total = 0.0;
    for (int b = 0; b < kGroupBlocks; ++b) {
      const float4* rows =
          reinterpret_cast<const float4*>(metric) + (at % groups * kGroupBlocks + b) * kCodeRows;
      const float4 m[kCodeRows] = {rows[0], rows[1], rows[2], rows[3]};
      const float4 v = reinterpret_cast<const float4*>(x)[b];
      total += static_cast<double>(dot4(v, apply_metric(m, v)));
    }
  }
  energy[at] = total;
}

__global__ void __launch_bounds__(kThreads)
    trial_scales_kernel(EncodeInput input, const double* rms, float* scale) {
  const int at = thread_index(), count = input.columns * (input.rows / kGroupRows);
  if (at >= count) return;
  for (int i = 0; i < input.factors; ++i) {
    scale[static_cast<int64_t>(i) * count + at] =
        static_cast<float>(__dmul_rn(rms[at], input.factor[i]));
  }
}

__global__ void __launch_bounds__(kThreads)
    sum_losses_kernel(const float* losses, int count, int columns, int groups, double* sums) {
  const int at = thread_index();
  if (at >= columns * count) return;
  const int n = at / count, trial = at % count;
  const float* from = losses + (static_cast<int64_t>(trial) * columns + n) * groups;
  sums[at] = pairwise_sum([from](int i) { return static_cast<double>(from[i]); }, 0, groups);
}

__device__ __forceinline__ double local_of(double scale, float super_scale) {
  return fmin(fmax(rint(scale / static_cast<double>(super_scale)), 0.0),
              static_cast<double>(kMaxLocal));
}

/// One warp a column, a lane a super scale.
__global__ void __launch_bounds__(kThreads)
    fit_scales_kernel(EncodeInput input, const double* sums, const double* rms,
                      const double* energy, const int* exponent, uint8_t* local,
                      float* super_scale) {
  const int lane = threadIdx.x % kWarp, n = blockIdx.x * kWarps + threadIdx.x / kWarp;
  if (n >= input.columns) return;
  const int groups = input.rows / kGroupRows;
  int least = 0;
  for (int i = 1; i < input.factors; ++i) {
    if (sums[n * input.factors + i] < sums[n * input.factors + least]) least = i;
  }
  const double factor = input.factor[least];
  const double* own_rms = rms + static_cast<int64_t>(n) * groups;
  const double* own_energy = energy + static_cast<int64_t>(n) * groups;
  double peak = 0.0;
  for (int g = 0; g < groups; ++g) peak = fmax(peak, __dmul_rn(own_rms[g], factor));
  const double top = 15.0 - 0.25 * lane;
  const float trial = round_bf16(static_cast<float>(fmax(peak / top, floor_of(exponent[n]))));
  const auto deviation = [=](int g) {
    const double scale = __dmul_rn(own_rms[g], factor);
    const double safe = scale > 0.0 ? scale : 1.0;
    const double off = __dsub_rn(__dmul_rn(local_of(scale, trial), trial) / safe, 1.0);
    return __dmul_rn(own_energy[g], __dmul_rn(off, off));
  };
  double error = lane < kTops ? pairwise_sum(deviation, 0, groups)
                              : __longlong_as_double(0x7ff0000000000000ll);
  int best = lane;
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const double other = __shfl_xor_sync(kFullMask, error, offset);
    const int owner = __shfl_xor_sync(kFullMask, best, offset);
    if (other < error || (other == error && owner < best)) {
      error = other;
      best = owner;
    }
  }
  const float chosen = __shfl_sync(kFullMask, trial, best);
  for (int g = lane; g < groups; g += kWarp) {
    local[static_cast<int64_t>(n) * groups + g] =
        static_cast<uint8_t>(local_of(__dmul_rn(own_rms[g], factor), chosen));
  }
  if (lane == 0) super_scale[n] = chosen;
}

__global__ void __launch_bounds__(kThreads)
    group_scales_kernel(const uint8_t* local, const float* super_scale, int columns, int groups,
                        float* scale) {
  const int at = thread_index();
  if (at < columns * groups) {
    scale[at] = __fmul_rn(static_cast<float>(local[at]), super_scale[at / groups]);
  }
}

__global__ void __launch_bounds__(kThreads)
    rank_codes_kernel(const double* sums, int columns, int codes, int count, int* order) {
  const int n = thread_index();
  if (n >= columns) return;
  const double* own = sums + static_cast<int64_t>(n) * codes;
  int last = -1;
  for (int i = 0; i < count; ++i) {
    int least = -1;
    for (int c = 0; c < codes; ++c) {
      const bool taken = last >= 0 && (own[c] < own[last] || (own[c] == own[last] && c <= last));
      if (!taken && (least < 0 || own[c] < own[least])) least = c;
    }
    order[static_cast<int64_t>(i) * columns + n] = last = least;
  }
}

__device__ __forceinline__ float valid_super(double ratio, int exponent) {
  return round_bf16(static_cast<float>(fmax(ratio, floor_of(exponent))));
}

__global__ void __launch_bounds__(kThreads)
    fit_super_kernel(EncodeInput input, const float* weight, const int* exponent, const int* code,
                     const uint8_t* packed, const uint8_t* local, float* super_scale) {
  const int at = thread_index();
  const int n = at / 2;
  const bool is_square = at % 2 == 1;
  const bool inside = n < input.columns;
  const int blocks = input.rows / kCodeRows, groups = input.rows / kGroupRows;
  const int column = inside ? n : 0;
  const float4* x =
      reinterpret_cast<const float4*>(weight + static_cast<int64_t>(column) * input.rows);
  const float4* book = input.books + code[column] * kCodewords;
  const uint8_t* bytes = packed + static_cast<int64_t>(column) * blocks;
  const uint8_t* scales = local + static_cast<int64_t>(column) * groups;
  const auto term = [=](int b) {
    const float4 p = book[bytes[b]];
    const double scale = scales[b / kGroupBlocks];
    if (is_square) {
      const auto two = [](float v) { return __dmul_rn(v, v); };
      const double sum = __dadd_rn(__dadd_rn(__dadd_rn(two(p.x), two(p.y)), two(p.z)), two(p.w));
      return __dmul_rn(sum, __dmul_rn(scale, scale));
    }
    const float4 v = x[b];
    const float sum = __fadd_rn(__fadd_rn(__fmul_rn(p.x, v.x), __fmul_rn(p.y, v.y)),
                                __fadd_rn(__fmul_rn(p.z, v.z), __fmul_rn(p.w, v.w)));
    return __dmul_rn(sum, scale);
  };
  const double sum = inside ? pairwise_sum(term, 0, blocks) : 0.0;
  const double square = __shfl_xor_sync(kFullMask, sum, 1);
  if (!inside || is_square) return;
  const double ratio = square > 0.0 ? sum / square : 0.0;
  if (ratio > 0.0) super_scale[n] = valid_super(ratio, exponent[n]);
}

__device__ __forceinline__ double warp_sum_double(double v) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    v += __shfl_xor_sync(kFullMask, v, offset);
  }
  return v;
}

/// One warp a column.
__global__ void __launch_bounds__(kThreads)
    solve_super_kernel(EncodeInput input, const int* exponent, HessianState s) {
  const int lane = threadIdx.x % kWarp, n = blockIdx.x * kWarps + threadIdx.x / kWarp;
  if (n >= input.columns) return;
  const int blocks = input.rows / kCodeRows, groups = input.rows / kGroupRows;
  const int64_t at = static_cast<int64_t>(n) * input.rows;
  const float4* book = input.books + s.code[n] * kCodewords;
  const float before = s.super_scale[n];
  const auto value_of = [&](int b) {
    float4 v = book[s.packed[static_cast<int64_t>(n) * blocks + b]];
    const float scale = s.local[static_cast<int64_t>(n) * groups + b / kGroupBlocks];
    v.x = __fmul_rn(v.x, scale), v.y = __fmul_rn(v.y, scale);
    v.z = __fmul_rn(v.z, scale), v.w = __fmul_rn(v.w, scale);
    return v;
  };
  const auto product_of = [&](int b) {  // values H, of what is known
    const float4 all = reinterpret_cast<const float4*>(s.weight_product + at)[b];
    const float4 off = reinterpret_cast<const float4*>(s.product + at)[b];
    return make_float4(__fsub_rn(all.x, off.x) / before, __fsub_rn(all.y, off.y) / before,
                       __fsub_rn(all.z, off.z) / before, __fsub_rn(all.w, off.w) / before);
  };
  double cross = 0.0, square = 0.0;
  for (int b = lane; b < blocks; b += kWarp) {
    const float4 product = product_of(b), value = value_of(b);
    const float4 weight = reinterpret_cast<const float4*>(s.weight + at)[b];
    const auto dot = [&](const float4& v) {
      return static_cast<double>(product.x) * v.x + static_cast<double>(product.y) * v.y +
             static_cast<double>(product.z) * v.z + static_cast<double>(product.w) * v.w;
    };
    cross += dot(weight);
    square += dot(value);
  }
  cross = warp_sum_double(cross);
  square = warp_sum_double(square);
  const double ratio = square > 0.0 ? cross / square : 0.0;
  const float scale = ratio > 0.0 ? valid_super(ratio, exponent[n]) : before;
  for (int b = lane; b < blocks; b += kWarp) {
    const float4 product = product_of(b), value = value_of(b);
    const float4 weight = reinterpret_cast<const float4*>(s.weight + at)[b];
    const float4 all = reinterpret_cast<const float4*>(s.weight_product + at)[b];
    const auto less = [scale](float x, float y) { return __fsub_rn(x, __fmul_rn(y, scale)); };
    reinterpret_cast<float4*>(s.error + at)[b] =
        make_float4(less(weight.x, value.x), less(weight.y, value.y), less(weight.z, value.z),
                    less(weight.w, value.w));
    reinterpret_cast<float4*>(s.product + at)[b] =
        make_float4(less(all.x, product.x), less(all.y, product.y), less(all.z, product.z),
                    less(all.w, product.w));
  }
  if (lane == 0) s.super_scale[n] = scale;
}

/// One warp a column.
__global__ void __launch_bounds__(kThreads)
    keep_better_kernel(HessianState tried, HessianState best, int columns, int groups, bool all,
                       double* least) {
  const int lane = threadIdx.x % kWarp, n = blockIdx.x * kWarps + threadIdx.x / kWarp;
  if (n >= columns) return;
  const int rows = groups * kGroupRows, blocks = groups * kGroupBlocks;
  const int64_t at = static_cast<int64_t>(n) * rows;
  double sum = 0.0;
  for (int k = lane; k < rows; k += kWarp) {
    sum += static_cast<double>(tried.product[at + k]) * tried.error[at + k];
  }
  sum = warp_sum_double(sum);
  const bool better = all || sum < least[n];
  __syncwarp();
  if (!better) return;
  for (int k = lane; k < rows; k += kWarp) best.error[at + k] = tried.error[at + k];
  for (int b = lane; b < blocks; b += kWarp) {
    best.packed[static_cast<int64_t>(n) * blocks + b] =
        tried.packed[static_cast<int64_t>(n) * blocks + b];
  }
  for (int g = lane; g < groups; g += kWarp) {
    best.local[static_cast<int64_t>(n) * groups + g] =
        tried.local[static_cast<int64_t>(n) * groups + g];
  }
  if (lane == 0) {
    best.code[n] = tried.code[n];
    best.super_scale[n] = tried.super_scale[n];
    least[n] = sum;
  }
}

__global__ void __launch_bounds__(kSide * 8)
    transpose_bytes_kernel(const uint8_t* from, int columns, int blocks, uint8_t* to) {
  __shared__ uint8_t tile[kSide][kSide + 1];
  const int lane = threadIdx.x % kSide, run = threadIdx.x / kSide;
  const int first_column = blockIdx.x * kSide, first_block = blockIdx.y * kSide;
  for (int i = run; i < kSide; i += 8) {
    const int n = first_column + i;
    if (n < columns) tile[i][lane] = from[static_cast<int64_t>(n) * blocks + first_block + lane];
  }
  __syncthreads();
  for (int i = run; i < kSide; i += 8) {
    const int n = first_column + lane;
    if (n < columns) to[static_cast<int64_t>(first_block + i) * columns + n] = tile[lane][i];
  }
}

__global__ void __launch_bounds__(kThreads)
    sums_kernel(const float* weight, const float* error, int columns, int rows, double* sums) {
  const int lane = threadIdx.x % kWarp, n = blockIdx.x * kWarps + threadIdx.x / kWarp;
  if (n >= columns) return;
  const int64_t at = static_cast<int64_t>(n) * rows;
  double energy = 0.0, off = 0.0;
  for (int k = lane; k < rows; k += kWarp) {
    energy += static_cast<double>(weight[at + k]) * weight[at + k];
    off += static_cast<double>(error[at + k]) * error[at + k];
  }
  energy = warp_sum_double(energy);
  off = warp_sum_double(off);
  if (lane == 0) {
    sums[2 * n] = energy;
    sums[2 * n + 1] = off;
  }
}

dim3 for_threads(int64_t count) {
  return dim3(static_cast<unsigned>(ceil_div<int64_t>(count, kThreads)));
}

dim3 for_columns(int columns) { return dim3(ceil_div(columns, kWarps)); }

template <typename T>
void prepare(const EncodeInput& input, float* scaled, int* exponent, cudaStream_t stream) {
  const T* weight = static_cast<const T*>(input.weight);
  const int across = ceil_div(input.columns, kSide);
  queue("column_peaks", column_peaks_kernel<T>, dim3(across), kSide * 8, stream, weight, input.rows,
        input.columns, exponent);
  queue("scale_columns", scale_columns_kernel<T>, dim3(across, input.rows / kSide), kSide * 8,
        stream, weight, input.row_of, input.rows, input.columns, exponent, scaled);
}

}  // namespace

void identity_metric(float* metric, cudaStream_t stream) {
  queue("identity", identity_kernel, dim3(1), 16, stream, metric);
}

void prepare_columns(const EncodeInput& input, float* scaled, int* exponent, cudaStream_t stream) {
  if (input.is_float) {
    prepare<float>(input, scaled, exponent, stream);
  } else {
    prepare<uint16_t>(input, scaled, exponent, stream);
  }
}

void measure_groups(const float* weight, int columns, int groups, const float* metric, double* rms,
                    double* energy, cudaStream_t stream) {
  queue("measure_groups", measure_groups_kernel, for_threads(int64_t{columns} * groups), kThreads,
        stream, weight, columns, groups, metric, rms, energy);
}

void trial_scales(const EncodeInput& input, const double* rms, float* scale, cudaStream_t stream) {
  queue("trial_scales", trial_scales_kernel,
        for_threads(int64_t{input.columns} * (input.rows / kGroupRows)), kThreads, stream, input,
        rms, scale);
}

void sum_losses(const float* losses, int count, int columns, int groups, double* sums,
                cudaStream_t stream) {
  queue("sum_losses", sum_losses_kernel, for_threads(int64_t{columns} * count), kThreads, stream,
        losses, count, columns, groups, sums);
}

void fit_scales(const EncodeInput& input, const double* sums, const double* rms,
                const double* energy, const int* exponent, uint8_t* local, float* super_scale,
                cudaStream_t stream) {
  queue("fit_scales", fit_scales_kernel, for_columns(input.columns), kThreads, stream, input, sums,
        rms, energy, exponent, local, super_scale);
}

void group_scales(const uint8_t* local, const float* super_scale, int columns, int groups,
                  float* scale, cudaStream_t stream) {
  queue("group_scales", group_scales_kernel, for_threads(int64_t{columns} * groups), kThreads,
        stream, local, super_scale, columns, groups, scale);
}

void rank_codes(const double* sums, int columns, int codes, int count, int* order,
                cudaStream_t stream) {
  queue("rank_codes", rank_codes_kernel, for_threads(columns), kThreads, stream, sums, columns,
        codes, count, order);
}

void fit_super_scale(const EncodeInput& input, const float* weight, const int* exponent,
                     const int* code, const uint8_t* packed, const uint8_t* local,
                     float* super_scale, cudaStream_t stream) {
  queue("fit_super_scale", fit_super_kernel, for_threads(2 * int64_t{input.columns}), kThreads,
        stream, input, weight, exponent, code, packed, local, super_scale);
}

void solve_super_scale(const EncodeInput& input, const int* exponent, const HessianState& state,
                       cudaStream_t stream) {
  queue("solve_super_scale", solve_super_kernel, for_columns(input.columns), kThreads, stream,
        input, exponent, state);
}

void keep_better(const HessianState& tried, const HessianState& best, int columns, int groups,
                 bool all, double* least, cudaStream_t stream) {
  queue("keep_better", keep_better_kernel, for_columns(columns), kThreads, stream, tried, best,
        columns, groups, all, least);
}

void finish_columns(const uint8_t* packed, const float* weight, const float* error, int columns,
                    int rows, const EncodeResult& result, cudaStream_t stream) {
  const dim3 grid(ceil_div(columns, kSide), rows / kCodeRows / kSide);
  queue("transpose_bytes", transpose_bytes_kernel, grid, kSide * 8, stream, packed, columns,
        rows / kCodeRows, result.packed);
  queue("sums", sums_kernel, for_columns(columns), kThreads, stream, weight, error, columns, rows,
        result.sums);
}

}  // namespace fd::cuda

// Embedding, RMS norm, SwiGLU and row copies: one pass over memory each, 8 bf16 per access.
#include "common.cuh"
#include "ops.h"

namespace fd::cuda {
namespace {

constexpr int kVector = 8;  // bf16 in 16 bytes
constexpr int kThreads = 256;

constexpr int kMaxVectors = 4;  // vectors of a row that one thread holds

struct Eight {
  float v[kVector];
};

__device__ __forceinline__ Eight load8(const bf16* p) {
  const uint4 raw = *reinterpret_cast<const uint4*>(p);
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
  Eight out;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = unpack_bf16(words[i]);
    out.v[2 * i] = pair.x;
    out.v[2 * i + 1] = pair.y;
  }
  return out;
}

__device__ __forceinline__ void store8(bf16* p, const Eight& x) {
  *reinterpret_cast<uint4*>(p) = make_uint4(pack_bf16(x.v[0], x.v[1]), pack_bf16(x.v[2], x.v[3]),
                                            pack_bf16(x.v[4], x.v[5]), pack_bf16(x.v[6], x.v[7]));
}

/// x += y, rounded to bf16.
__device__ __forceinline__ void add_rounded(Eight& x, const Eight& y) {
#pragma unroll
  for (int j = 0; j < kVector; ++j) {
    x.v[j] = __bfloat162float(__float2bfloat16_rn(x.v[j] + y.v[j]));
  }
}

__device__ float block_sum(float value) {
  __shared__ float sums[kWarp];
  value = warp_sum(value);
  if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = value;
  __syncthreads();
  float total = 0.0f;
  for (unsigned i = 0; i < blockDim.x / kWarp; ++i) total += sums[i];
  return total;
}

template <typename Weight>
__device__ __forceinline__ float weight_at(const Weight* w, int i) {
  return static_cast<float>(w[i]);
}

/// One block a row. The row stays in registers between the two passes over it (hidden <= 4 * 8 *
/// threads).
/// kAdds: 1 adds x to the residual first, 2 adds y to x before that.
template <typename Weight, int kAdds>
__global__ void __launch_bounds__(1024)
    rms_norm_kernel(const bf16* x, const bf16* y, bf16* residual, const Weight* weight, float eps,
                    bf16* out, int hidden) {
  wait_for_inputs();
  const int64_t row = int64_t{blockIdx.x} * hidden;
  Eight held[kMaxVectors];
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < kMaxVectors; ++i) {
    const int at = (i * blockDim.x + threadIdx.x) * kVector;
    if (at >= hidden) break;
    held[i] = load8(x + row + at);
    if constexpr (kAdds == 2) add_rounded(held[i], load8(y + row + at));
    if constexpr (kAdds > 0) {
      add_rounded(held[i], load8(residual + row + at));
      store8(residual + row + at, held[i]);
    }
#pragma unroll
    for (int j = 0; j < kVector; ++j) squares += held[i].v[j] * held[i].v[j];
  }
  const float scale = rsqrtf(block_sum(squares) / hidden + eps);
#pragma unroll
  for (int i = 0; i < kMaxVectors; ++i) {
    const int at = (i * blockDim.x + threadIdx.x) * kVector;
    if (at >= hidden) break;
#pragma unroll
    for (int j = 0; j < kVector; ++j) held[i].v[j] *= scale * weight_at(weight, at + j);
    store8(out + row + at, held[i]);
  }
}

__global__ void silu_and_mul_kernel(const bf16* x, bf16* out, int width, int64_t vectors) {
  wait_for_inputs();
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= vectors) return;
  const int per_row = width / kVector;
  const int64_t row = i / per_row;
  const int at = static_cast<int>(i % per_row) * kVector;
  const Eight gate = load8(x + row * 2 * width + at);
  Eight up = load8(x + row * 2 * width + width + at);
#pragma unroll
  for (int j = 0; j < kVector; ++j) up.v[j] *= gate.v[j] / (1.0f + __expf(-gate.v[j]));
  store8(out + row * width + at, up);
}

__global__ void add_kernel(bf16* x, const bf16* y, int64_t count) {
  wait_for_inputs();
  const int64_t i = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * kVector;
  if (i + kVector <= count) {
    Eight a = load8(x + i);
    const Eight b = load8(y + i);
#pragma unroll
    for (int j = 0; j < kVector; ++j) a.v[j] += b.v[j];
    store8(x + i, a);
  } else {
    for (int64_t j = i; j < count; ++j) x[j] = __float2bfloat16_rn(float(x[j]) + float(y[j]));
  }
}

template <typename Unit>
__global__ void gather_kernel(const Unit* x, const int* rows, Unit* out, int64_t width, int first,
                              int source_rows) {
  wait_for_inputs();
  const int64_t to = blockIdx.x;
  const int from = rows[to] - first;
  const bool valid = from >= 0 && from < source_rows;
  for (int64_t i = int64_t{blockIdx.y} * blockDim.x + threadIdx.x; i < width;
       i += int64_t{gridDim.y} * blockDim.x) {
    out[to * width + i] = valid ? x[from * width + i] : Unit{};
  }
}

template <typename Unit>
void launch_gather(const void* x, const int* rows, void* out, int count, int64_t width, int first,
                   int source_rows, cudaStream_t stream) {
  const int64_t pieces = ceil_div<int64_t>(width, kThreads);
  const dim3 grid(count, static_cast<unsigned>(pieces < 32 ? pieces : 32));
  launch("gather_rows", gather_kernel<Unit>, grid, kThreads, 0, stream, static_cast<const Unit*>(x),
         rows, static_cast<Unit*>(out), width, first, source_rows);
}

void gather(const void* x, const int* rows, void* out, int count, int64_t row_bytes, int first,
            int source_rows, cudaStream_t stream) {
  if (row_bytes % 16 == 0) {
    launch_gather<uint4>(x, rows, out, count, row_bytes / 16, first, source_rows, stream);
  } else {
    launch_gather<uint16_t>(x, rows, out, count, row_bytes / 2, first, source_rows, stream);
  }
}

template <typename Weight>
void launch_norm(const bf16* x, const bf16* y, bf16* residual, const Weight* weight, float eps,
                 bf16* out, int tokens, int hidden, cudaStream_t stream) {
  const int vectors = hidden / kVector;
  const int wanted = ceil_div(vectors, kWarp) * kWarp;
  const int threads = wanted < 1024 ? wanted : 1024;
  auto kernel = residual == nullptr ? rms_norm_kernel<Weight, 0>
                : y == nullptr      ? rms_norm_kernel<Weight, 1>
                                    : rms_norm_kernel<Weight, 2>;
  launch("rms_norm", kernel, tokens, threads, 0, stream, x, y, residual, weight, eps, out, hidden);
}

}  // namespace

void embedding(const int* ids, const bf16* table, bf16* out, int tokens, int hidden, int first,
               int vocab, cudaStream_t stream) {
  gather(table, ids, out, tokens, int64_t{hidden} * 2, first, vocab, stream);
}

void rms_norm(const bf16* x, const bf16* y, bf16* residual, const void* weight,
              bool weight_is_float, float eps, bf16* out, int tokens, int hidden,
              cudaStream_t stream) {
  if (hidden % kVector != 0 || hidden > kMaxVectors * kVector * 1024) {
    throw std::runtime_error("rms_norm: hidden size " + std::to_string(hidden) +
                             " is not a multiple of 8 up to 32768");
  }
  if (weight_is_float) {
    launch_norm(x, y, residual, static_cast<const float*>(weight), eps, out, tokens, hidden,
                stream);
  } else {
    launch_norm(x, y, residual, static_cast<const bf16*>(weight), eps, out, tokens, hidden, stream);
  }
}

void silu_and_mul(const bf16* x, bf16* out, int tokens, int width, cudaStream_t stream) {
  if (width % kVector != 0) {
    throw std::runtime_error("silu_and_mul: width " + std::to_string(width) +
                             " is not a multiple of 8");
  }
  const int64_t vectors = int64_t{tokens} * width / kVector;
  launch("silu_and_mul", silu_and_mul_kernel,
         static_cast<unsigned>(ceil_div<int64_t>(vectors, kThreads)), kThreads, 0, stream, x, out,
         width, vectors);
}

void add_inplace(bf16* x, const bf16* y, int64_t count, cudaStream_t stream) {
  const int64_t vectors = ceil_div<int64_t>(count, kVector);
  launch("add_inplace", add_kernel, static_cast<unsigned>(ceil_div<int64_t>(vectors, kThreads)),
         kThreads, 0, stream, x, y, count);
}

void gather_rows(const void* x, const int* rows, void* out, int count, int64_t row_bytes,
                 int source_rows, cudaStream_t stream) {
  gather(x, rows, out, count, row_bytes, 0, source_rows, stream);
}

}  // namespace fd::cuda

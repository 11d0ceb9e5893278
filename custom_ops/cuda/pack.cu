// From the checkpoint's layouts to tiles, and back for tests; random weights for
// load_choices=dummy.
#include "gemm.h"
#include "ops.h"
#include "pack_source.cuh"
#include "weight_tiles.cuh"

namespace fd::cuda {
namespace {

constexpr int kThreads = 256;

/// 32-bit word `i` of vector `vector` of the tile, for the lane that owns columns n, n + 8 and, per
/// chunk, the 8 rows from k (of chunk 0) on. The inverse of decode_fragment.
template <Kind kKind>
__device__ uint32_t tile_word(const Source& source, int vector, int i, int k, int n) {
  uint32_t word = 0;
  if constexpr (is_ccq(kKind)) {
    const int row = k + 32 * i;
    for (int b = 0; b < 4; ++b) {
      word |= source.code_byte(row + 4 * (b % 2), n + 8 * (b / 2)) << (8 * b);
    }
  } else if constexpr (kKind == Kind::kInt4) {
    const int row = k + 32 * (2 * vector + i / 2), column = n + 8 * (i % 2);
    for (int j = 0; j < 4; ++j) {
      word |= source.int4(row + 2 * j, column) << (4 * j);
      word |= source.int4(row + 2 * j + 1, column) << (4 * j + 16);
    }
  } else if constexpr (kKind == Kind::kInt8) {
    const int row = k + 32 * vector + 4 * (i % 2), column = n + 8 * (i / 2);
    for (int b = 0; b < 4; ++b) word |= source.int8(row + b, column) << (8 * b);
  } else {
    const int row = k + 32 * (vector / 2) + 2 * i, column = n + 8 * (vector % 2);
    word = source.bf16_bits(row, column) | source.bf16_bits(row + 1, column) << 16;
  }
  return word;
}

template <Kind kKind>
__global__ void pack_tiles_kernel(Source source, uint4* tiles, int k_tiles, int64_t vectors) {
  const int64_t at = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (at >= vectors) return;
  constexpr int kVectors = tile_vectors(kKind);
  const int lane = at % kWarp;
  const int vector = at / kWarp % kVectors;
  const int64_t tile = at / (kWarp * kVectors);
  const int n = static_cast<int>(tile / k_tiles) * kTileColumns + lane / 4;
  const int k = static_cast<int>(tile % k_tiles) * kTileRows + 8 * (lane % 4);
  tiles[at] = make_uint4(
      tile_word<kKind>(source, vector, 0, k, n), tile_word<kKind>(source, vector, 1, k, n),
      tile_word<kKind>(source, vector, 2, k, n), tile_word<kKind>(source, vector, 3, k, n));
}

__global__ void pack_local_scales_kernel(const uint8_t* source, uint16_t* packed, int k_tiles,
                                         int out_features, int64_t count) {
  const int64_t at = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (at >= count) return;
  const int64_t tile = at / 8;
  const int n = static_cast<int>(tile / k_tiles) * kTileColumns + at % 8;
  const int64_t row = tile % k_tiles * out_features;
  const uint32_t low = n < out_features ? source[row + n] : 0;
  const uint32_t high = n + 8 < out_features ? source[row + n + 8] : 0;
  packed[at] = static_cast<uint16_t>(low | high << 8);
}

/// 32 x 32 tiles through shared memory, so that both sides are read and written along their rows.
__global__ void pack_rows_kernel(Source source, bf16* out) {
  __shared__ uint16_t tile[32][33];
  const int k0 = blockIdx.x * 32, n0 = blockIdx.y * 32;
  for (int y = threadIdx.y; y < 32; y += blockDim.y) {
    const int k = source.transposed ? k0 + threadIdx.x : k0 + y;
    const int n = source.transposed ? n0 + y : n0 + threadIdx.x;
    tile[n - n0][k - k0] = static_cast<uint16_t>(source.bf16_bits(k, n));
  }
  __syncthreads();
  for (int y = threadIdx.y; y < 32; y += blockDim.y) {
    const int n = n0 + y, k = k0 + threadIdx.x;
    if (source.inside(k, n)) {
      out[int64_t{n} * source.in_features + k] = __ushort_as_bfloat16(tile[y][threadIdx.x]);
    }
  }
}

template <Kind kKind, int kChunk, int kStep>
__device__ void unpack_step(const uint4 (&v)[tile_vectors(kKind)], const LaneColumns& columns,
                            const float (&scale)[2], float* out, int k, int n, int in_features,
                            int out_features) {
  uint32_t a[4];
  decode_fragment<kKind, kChunk, kStep>(v, columns, a);
  for (int i = 0; i < 4; ++i) {
    const int column = n + 8 * (i % 2);
    const int row = k + 32 * kChunk + 4 * kStep + 2 * (i / 2);
    const float2 pair = unpack_bf16(is_ccq(kKind) ? add2(a[i], kMinus160) : a[i]);
    if (column >= out_features) continue;
    if (row < in_features) out[int64_t{row} * out_features + column] = pair.x * scale[i % 2];
    if (row + 1 < in_features)
      out[int64_t{row + 1} * out_features + column] = pair.y * scale[i % 2];
  }
}

template <Kind kKind>
__global__ void unpack_tiles_kernel(const TiledWeight w, bool scaled, float* out) {
  const int lane = threadIdx.x;
  const int n_tile = blockIdx.y, k_tile = blockIdx.x;
  const int n = n_tile * kTileColumns + lane / 4;
  const int k = k_tile * kTileRows + 8 * (lane % 4);
  const int64_t tile = int64_t{n_tile} * w.k_tiles + k_tile;
  constexpr int kVectors = tile_vectors(kKind);
  uint4 v[kVectors];
  for (int i = 0; i < kVectors; ++i) v[i] = w.tiles[(tile * kVectors + i) * kWarp + lane];
  const LaneColumns columns = load_columns<kKind>(w, n);
  float first[2] = {1.0f, 1.0f}, second[2] = {1.0f, 1.0f};
  if (scaled && is_ccq(kKind)) {
    local_scales<0>(w.local_scale[tile * 8 + lane / 4], columns.constants, first);
    local_scales<1>(w.local_scale[tile * 8 + lane / 4], columns.constants, second);
  }
  if (scaled && kKind != Kind::kDense) {
    for (int i = 0; i < 2; ++i) {
      first[i] *= w.column_scale[n + 8 * i];
      second[i] *= w.column_scale[n + 8 * i];
    }
  }
  const int rows = w.in_features, width = w.out_features;
  unpack_step<kKind, 0, 0>(v, columns, first, out, k, n, rows, width);
  unpack_step<kKind, 0, 1>(v, columns, first, out, k, n, rows, width);
  unpack_step<kKind, 1, 0>(v, columns, first, out, k, n, rows, width);
  unpack_step<kKind, 1, 1>(v, columns, first, out, k, n, rows, width);
  unpack_step<kKind, 2, 0>(v, columns, second, out, k, n, rows, width);
  unpack_step<kKind, 2, 1>(v, columns, second, out, k, n, rows, width);
  unpack_step<kKind, 3, 0>(v, columns, second, out, k, n, rows, width);
  unpack_step<kKind, 3, 1>(v, columns, second, out, k, n, rows, width);
}

/// SplitMix64: one well mixed 64-bit number per index.
__device__ __forceinline__ uint64_t mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

/// Bytes without 0x00 (int8), nibbles without 0 (int4), any byte (CCQ), uniform numbers (dense).
__device__ __forceinline__ uint32_t random_word(Kind kind, uint32_t bits, float size) {
  if (kind == Kind::kInt8) {
    for (int b = 0; b < 4; ++b) {
      if (((bits >> (8 * b)) & 0xffu) == 0) bits |= 1u << (8 * b);
    }
  } else if (kind == Kind::kInt4) {
    for (int b = 0; b < 8; ++b) {
      if (((bits >> (4 * b)) & 0xfu) == 0) bits |= 8u << (4 * b);
    }
  } else if (kind == Kind::kDense) {
    const float range = 3.4641f * size;  // of two uniform numbers with that deviation
    const float low = (static_cast<float>(bits & 0xffffu) / 65536.0f - 0.5f) * range;
    const float high = (static_cast<float>(bits >> 16) / 65536.0f - 0.5f) * range;
    bits = pack_bf16(low, high);
  }
  return bits;
}

__global__ void randomize_kernel(Kind kind, uint32_t* data, int64_t words, uint64_t seed,
                                 float size) {
  const uint64_t start = mix(seed);
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < words; i += stride) {
    data[i] = random_word(kind, static_cast<uint32_t>(mix(start ^ static_cast<uint64_t>(i))), size);
  }
}

template <Kind kKind>
void launch_pack(const Source& source, void* tiles, cudaStream_t stream) {
  const int k_tiles = ceil_div(source.in_features, kTileRows);
  const int64_t n_tiles = ceil_div(source.out_features, kTileColumns);
  const int64_t vectors = n_tiles * k_tiles * tile_vectors(kKind) * kWarp;
  pack_tiles_kernel<kKind>
      <<<static_cast<unsigned>(ceil_div<int64_t>(vectors, kThreads)), kThreads, 0, stream>>>(
          source, static_cast<uint4*>(tiles), k_tiles, vectors);
  check_launch("pack_tiles");
}

template <Kind kKind>
void launch_unpack(const TiledWeight& w, bool scaled, float* out, cudaStream_t stream) {
  unpack_tiles_kernel<kKind><<<dim3(w.k_tiles, w.n_tiles), kWarp, 0, stream>>>(w, scaled, out);
  check_launch("unpack_tiles");
}

}  // namespace

void pack_tiles(int kind, const void* data, bool source_is_float, bool transposed, void* tiles,
                int in_features, int out_features, cudaStream_t stream) {
  const Source source{data, source_is_float, transposed, in_features, out_features};
  switch (static_cast<Kind>(kind)) {
    case Kind::kDense:
      return launch_pack<Kind::kDense>(source, tiles, stream);
    case Kind::kInt8:
      return launch_pack<Kind::kInt8>(source, tiles, stream);
    case Kind::kInt4:
      return launch_pack<Kind::kInt4>(source, tiles, stream);
    case Kind::kCcq:
    case Kind::kCcqWide:
      return launch_pack<Kind::kCcq>(source, tiles, stream);
  }
}

void pack_local_scales(const uint8_t* source, void* packed, int in_features, int out_features,
                       cudaStream_t stream) {
  const int k_tiles = ceil_div(in_features, kTileRows);
  const int64_t count = int64_t{ceil_div(out_features, kTileColumns)} * k_tiles * 8;
  pack_local_scales_kernel<<<static_cast<unsigned>(ceil_div<int64_t>(count, kThreads)), kThreads, 0,
                             stream>>>(source, static_cast<uint16_t*>(packed), k_tiles,
                                       out_features, count);
  check_launch("pack_local_scales");
}

void pack_rows(const void* data, bool source_is_float, bool transposed, bf16* out, int in_features,
               int out_features, cudaStream_t stream) {
  const Source source{data, source_is_float, transposed, in_features, out_features};
  const dim3 grid(ceil_div(in_features, 32), ceil_div(out_features, 32));
  pack_rows_kernel<<<grid, dim3(32, 8), 0, stream>>>(source, out);
  check_launch("pack_rows");
}

void unpack_tiles(int kind, const void* tiles, const void* local_scale, const float* code_scale,
                  const float* code_bias, const float* column_scale, bool scaled, float* out,
                  int in_features, int out_features, cudaStream_t stream) {
  const TiledWeight w{static_cast<const uint4*>(tiles),
                      static_cast<const uint16_t*>(local_scale),
                      code_scale,
                      code_bias,
                      column_scale,
                      in_features,
                      out_features,
                      ceil_div(out_features, kTileColumns),
                      ceil_div(in_features, kTileRows)};
  switch (static_cast<Kind>(kind)) {
    case Kind::kDense:
      return launch_unpack<Kind::kDense>(w, scaled, out, stream);
    case Kind::kInt8:
      return launch_unpack<Kind::kInt8>(w, scaled, out, stream);
    case Kind::kInt4:
      return launch_unpack<Kind::kInt4>(w, scaled, out, stream);
    case Kind::kCcq:
      return launch_unpack<Kind::kCcq>(w, scaled, out, stream);
    case Kind::kCcqWide:
      return launch_unpack<Kind::kCcqWide>(w, scaled, out, stream);
  }
}

void randomize(int kind, void* data, int64_t bytes, uint64_t seed, float size,
               cudaStream_t stream) {
  randomize_kernel<<<1024, kThreads, 0, stream>>>(
      static_cast<Kind>(kind), static_cast<uint32_t*>(data), bytes / 4, seed, size);
  check_launch("randomize");
}

}  // namespace fd::cuda

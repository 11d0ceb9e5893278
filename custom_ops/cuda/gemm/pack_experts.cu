// Experts from the checkpoint's layouts to chunks and back, and the constants of the fast decoder.
#include "../pack_source.cuh"
#include "canonical.cuh"
#include "decode_digits.cuh"
#include "pack_experts.h"

namespace fd::cuda {
namespace {

constexpr int kThreads = 256;

/// Column of the file that is column `q` of block `block`.
__device__ __forceinline__ int file_column(int block, int q, int out_features) {
  return block * 8 + q % 8 + (q < 8 ? 0 : out_features / 2);
}

/// 32-bit word `i` of vector `vector` of a tile, for rows k .. k + 7 of every 32 and columns n[0],
/// n[1].
template <Coding kCoding>
__device__ uint32_t chunk_word(const Source& source, int vector, int i, int k, const int (&n)[2]) {
  uint32_t word = 0;
  if constexpr (kCoding == Coding::kCcq) {
    for (int b = 0; b < 4; ++b) {
      word |= source.code_byte(k + 32 * i + 4 * (b % 2), n[b / 2]) << (8 * b);
    }
  } else if constexpr (kCoding == Coding::kInt4) {
    const int row = k + 32 * (2 * vector + i / 2);
    for (int j = 0; j < 8; ++j) word |= source.int4(row + j, n[i % 2]) << (4 * j);
  } else {
    const int row = k + 32 * vector + 4 * (i % 2);
    for (int b = 0; b < 4; ++b) word |= source.int8(row + b, n[i / 2]) << (8 * b);
  }
  return word;
}

/// A thread for each 16-byte vector of a chunk, its scales included.
template <Coding kCoding>
__global__ void pack_kernel(const Source source, const uint8_t* local_scale, uint8_t* chunks,
                            int chunks_of_k, int64_t vectors) {
  constexpr int kScaleVectors = scale_bytes(kCoding) / 16;
  constexpr int kVectors = chunk_bytes(kCoding) / 16;
  const int64_t at = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (at >= vectors) return;
  const int64_t chunk = at / kVectors;
  const int block = static_cast<int>(chunk / chunks_of_k);
  const int k0 = static_cast<int>(chunk % chunks_of_k) * kChunkK;
  const int inside = static_cast<int>(at % kVectors);
  uint32_t words[4];
  if (inside < kScaleVectors) {
    for (int i = 0; i < 4; ++i) {  // word 2g + h: tiles 2h and 2h + 1 of columns g and g + 8
      const int g = inside * 2 + i / 2;
      words[i] = 0;
      for (int half = 0; half < 2; ++half) {
        const int n = file_column(block, g + 8 * half, source.out_features);
        for (int t = 0; t < 2; ++t) {
          const int row = k0 / kTileK + i % 2 * 2 + t;
          const uint32_t byte = row * kTileK < source.in_features
                                    ? local_scale[int64_t{row} * source.out_features + n]
                                    : 0;
          words[i] |= (byte >> 4 | (byte & 15) << 4) << (16 * half + 8 * t);
        }
      }
    }
  } else {
    const int vector = inside - kScaleVectors, lane = vector % kWarp;
    const int of_tile = vector / kWarp % lane_vectors(kCoding);
    const int k = k0 + vector / (kWarp * lane_vectors(kCoding)) * kTileK + 8 * (lane % 4);
    const int n[2] = {file_column(block, lane / 4, source.out_features),
                      file_column(block, lane / 4 + 8, source.out_features)};
    for (int i = 0; i < 4; ++i) words[i] = chunk_word<kCoding>(source, of_tile, i, k, n);
  }
  reinterpret_cast<uint4*>(chunks)[at] = make_uint4(words[0], words[1], words[2], words[3]);
}

/// Column vectors from file order to block order.
__global__ void order_kernel(const float* from, float* to, int out_features) {
  const int at = blockIdx.x * blockDim.x + threadIdx.x;
  if (at < out_features) {
    to[at] = from[file_column(at / kBlockColumns, at % kBlockColumns, out_features)];
  }
}

// -- constants of the fast decoder ----------------------------------------------------------------

constexpr int kTries = 96;
constexpr double kShiftUnit = 1.0 / 8192;  // of a code; a try moves the column's line by a few

/// The best of all threads by `error`, lower numbers first where equal.
__device__ void best_of_block(double& error, int& which) {
  __shared__ double errors[8];
  __shared__ int numbers[8];
  auto take = [&](double other, int number) {
    if (other < error || (other == error && number < which)) {
      error = other;
      which = number;
    }
  };
  for (int offset = 16; offset > 0; offset >>= 1) {
    const double other = __shfl_xor_sync(kFullMask, error, offset);
    take(other, __shfl_xor_sync(kFullMask, which, offset));
  }
  __syncthreads();
  if (threadIdx.x % kWarp == 0) {
    errors[threadIdx.x / kWarp] = error;
    numbers[threadIdx.x / kWarp] = which;
  }
  __syncthreads();
  for (int i = 0; i < 8; ++i) take(errors[i], numbers[i]);
}

/// The reference's code of a byte: see quantization/ccq.py.
__device__ __forceinline__ int reference_code(float scale, float bias, int byte) {
  return __float2int_rd(__fmaf_rn(static_cast<float>(byte), scale, bias));
}

/// Whether the fast decoder gives byte's four fields in both places of a pair.
__device__ bool decodes(const ColumnCode& code, int byte, int expected) {
  LaneCode<false> lane;
  for (int i = 0; i < 2; ++i) {
    lane.magic[i] = code.magic;
    lane.scale[i] = code.scale;
    lane.base[i] = code.base;
    lane.odd_base[i] = code.base + kCarry;
  }
  // the neighbour's bits must not matter: the lowest and the highest byte beside it
  const uint32_t mask = 0x7fff7fffu, both = static_cast<uint32_t>(expected & 0x7fff) * 0x10001u;
  const Registers held(0);
  const uint32_t alike = lane.codes<0>(static_cast<uint32_t>(byte) * 0x01010101u, held);
  bool right = (alike & mask) == both;
  for (const uint32_t other : {0u, 255u}) {
    const uint32_t low = lane.codes<0>(other << 8 | byte, held);
    const uint32_t high = lane.codes<0>(static_cast<uint32_t>(byte) << 8 | other, held);
    right = right && ((low ^ both) & 0x7fffu) == 0 && ((high ^ both) & 0x7fff0000u) == 0;
  }
  return right;
}

/// Whether the integer products' decoder gives byte's four fields, too, whatever stands beside it.
__device__ bool gives_fields(const ColumnCode& code, int byte, int expected) {
  DigitCode<false> lane;
  lane.set(0, code);
  const Registers held(0);
  const uint32_t d = expected & 0x7fff, fields = (d << 18 | d >> 1) & kFieldBytes;
  bool right = true;
  for (const uint32_t other : {0u, 255u}) {
    right = right && lane.fields<0>(other << 8 | byte, held) == fields &&
            lane.fields<1>(static_cast<uint32_t>(byte) << 8 | other, held) == fields;
  }
  return right;
}

/// Whether a float holds the number.
__device__ bool is_float(double number) {
  return static_cast<double>(static_cast<float>(number)) == number;
}

/// One block of 256 threads a column, a thread a byte. The decoder computes X * scale + base for
/// X = 2^15 + 256 m + byte + l / 256 and rounds down to an integer. `base` has to be an integer, so
/// m and l are chosen such that the rest of X times scale has the fraction of the column's bias,
/// moved by a little from try to try, as the reference rounds before it floors; later tries also
/// take the neighbours of the scale.
__global__ void fit_kernel(const float2* exact, ColumnCode* codes, int* unproven) {
  __shared__ int lowest, highest;
  const int byte = threadIdx.x;
  const float scale = exact[blockIdx.x].x, bias = exact[blockIdx.x].y;
  const int expected = reference_code(scale, bias, byte);
  if (byte == 0) {
    lowest = INT_MAX;
    highest = INT_MIN;
  }
  __syncthreads();
  atomicMin(&lowest, expected);
  atomicMax(&highest, expected);
  __syncthreads();
  // codes are counted from a multiple of 2^15, so that the lowest is in 1 .. 2^15
  const int64_t lift = -((int64_t{lowest} - 1) >> 15 << 15);
  bool done = !(highest + lift < 65535) || fabsf(scale) > 1024.0f;
  for (int t = 0; t < kTries && !done; ++t) {
    const int step = t % 24, nudge = t / 24 % 2 == 0 ? t / 48 : -(t / 48) - 1;
    const double shift = (step % 2 == 0 ? step / 2 : -(step / 2) - 1) * kShiftUnit;
    const float tried = __int_as_float(__float_as_int(scale) + nudge);
    double error = 2.0;
    int which = 0;
    for (int m = 0; m < 128; ++m) {
      const double rest = (32768.0 + 256.0 * m + byte / 256.0) * tried - (bias + shift);
      const double off = fabs(rest - rint(rest));
      if (off < error) {
        error = off;
        which = m * 256 + byte;
      }
    }
    best_of_block(error, which);
    const double rest = (32768.0 + 256.0 * (which / 256) + which % 256 / 256.0) * tried;
    const double base = 8388608.0 + static_cast<double>(lift) + rint(bias + shift - rest);
    const ColumnCode code{
        0x47000000u | static_cast<uint32_t>(which / 256) << 16 | static_cast<uint32_t>(which % 256),
        tried, static_cast<float>(base), 1u};
    const bool whole = is_float(base) && is_float(base + kCarry) && is_float(base + kDigitLow) &&
                       is_float(base + kDigitHigh);
    done = __syncthreads_and(whole && decodes(code, byte, expected) &&
                             gives_fields(code, byte, expected)) != 0;
    if (done && byte == 0) codes[blockIdx.x] = code;
    if (done) return;
  }
  if (byte == 0) {
    codes[blockIdx.x] = {0x47000000u, 0.0f, 0.0f, 0u};
    atomicAdd(unproven, 1);
  }
}

// -- back -----------------------------------------------------------------------------------------

/// One warp a chunk.
template <Coding kCoding, bool kExact>
__global__ void unpack_kernel(const ExpertWeight w, int expert, bool scaled_too, float* out) {
  const int lane = threadIdx.x, g = lane / 4, c = lane % 4;
  const int chunks = w.chunks_of_k(), block = blockIdx.x / chunks, chunk = blockIdx.x % chunks;
  const int64_t weight_block = int64_t{expert} * w.blocks() + block;
  const int64_t column = weight_block * kBlockColumns + g;
  const uint8_t* at = w.chunks + (weight_block * chunks + chunk) * chunk_bytes(kCoding);
  const Registers held(static_cast<uint32_t>(w.out_features) >> 30);
  LaneCode<kExact> code;
  if constexpr (kCoding == Coding::kCcq) code.load(w.codes, w.exact, column);
  for (int t = 0; t < kChunkTiles; ++t) {
    LaneTile<kCoding, kExact> tile;
    const uint4* v =
        reinterpret_cast<const uint4*>(at + scale_bytes(kCoding) + t * tile_size(kCoding));
    for (int i = 0; i < lane_vectors(kCoding); ++i) tile.v[i] = v[i * kWarp + lane];
    uint32_t pairs = 0;
    if constexpr (kCoding == Coding::kCcq) {
      pairs = reinterpret_cast<const uint32_t*>(at)[g * 2 + t / 2] >> (t % 2 * 8);
      if (!scaled_too) pairs = 0x00110011u;
    }
    const GroupScale scale[2] = {GroupScale::of<0>(pairs, held), GroupScale::of<1>(pairs, held)};
    uint32_t a[4][2][4];
    tile.template decode<0, 0>(code, scale[0], held, a[0][0]);
    tile.template decode<0, 1>(code, scale[0], held, a[0][1]);
    tile.template decode<1, 0>(code, scale[0], held, a[1][0]);
    tile.template decode<1, 1>(code, scale[0], held, a[1][1]);
    tile.template decode<2, 0>(code, scale[1], held, a[2][0]);
    tile.template decode<2, 1>(code, scale[1], held, a[2][1]);
    tile.template decode<3, 0>(code, scale[1], held, a[3][0]);
    tile.template decode<3, 1>(code, scale[1], held, a[3][1]);
    for (int i = 0; i < 4 * 2 * 4 * 2; ++i) {
      const int part = i / 16, step = i / 8 % 2, word = i / 2 % 4, half = i % 2;
      const int slot = step * 16 + word / 2 * 8 + 2 * c + half;
      const int k = chunk * kChunkK + t * kTileK + part * 32 + row_of_slot(slot);
      if (k >= w.in_features) continue;
      const uint32_t pair = a[part][step][word];
      float value =
          __half2float(__ushort_as_half(static_cast<unsigned short>(pair >> (16 * half))));
      if (scaled_too) value *= w.column_scale[column + 8 * (word % 2)];
      out[int64_t{k} * w.out_features + file_column(block, g + 8 * (word % 2), w.out_features)] =
          value;
    }
  }
}

template <Coding kCoding>
void pack(const Source& source, const uint8_t* local_scale, uint8_t* chunks, cudaStream_t stream) {
  const int chunks_of_k = ceil_div(source.in_features, kChunkK);
  const int64_t vectors =
      int64_t{source.out_features / kBlockColumns} * chunks_of_k * (chunk_bytes(kCoding) / 16);
  pack_kernel<kCoding>
      <<<static_cast<unsigned>(ceil_div<int64_t>(vectors, kThreads)), kThreads, 0, stream>>>(
          source, local_scale, chunks, chunks_of_k, vectors);
  check_launch("pack_expert");
}

template <Coding kCoding, bool kExact>
void unpack(const ExpertWeight& w, int expert, bool scaled_too, float* out, cudaStream_t stream) {
  unpack_kernel<kCoding, kExact>
      <<<w.blocks() * w.chunks_of_k(), kWarp, 0, stream>>>(w, expert, scaled_too, out);
  check_launch("unpack_expert");
}

}  // namespace

void pack_expert(Coding coding, const void* codes, const uint8_t* local_scale, uint8_t* chunks,
                 int in_features, int out_features, cudaStream_t stream) {
  const Source source{codes, false, false, in_features, out_features};
  switch (coding) {
    case Coding::kCcq:
      return pack<Coding::kCcq>(source, local_scale, chunks, stream);
    case Coding::kInt4:
      return pack<Coding::kInt4>(source, nullptr, chunks, stream);
    case Coding::kInt8:
      return pack<Coding::kInt8>(source, nullptr, chunks, stream);
  }
}

void order_columns(const float* from, float* to, int out_features, cudaStream_t stream) {
  order_kernel<<<ceil_div(out_features, kThreads), kThreads, 0, stream>>>(from, to, out_features);
  check_launch("order_columns");
}

void fit_columns(const float2* exact, ColumnCode* codes, int columns, int* unproven,
                 cudaStream_t stream) {
  fit_kernel<<<columns, 256, 0, stream>>>(exact, codes, unproven);
  check_launch("fit_columns");
}

void unpack_expert(const ExpertWeight& w, int expert, bool scaled_too, float* out,
                   cudaStream_t stream) {
  switch (w.coding) {
    case Coding::kCcq:
      if (w.proven) return unpack<Coding::kCcq, false>(w, expert, scaled_too, out, stream);
      return unpack<Coding::kCcq, true>(w, expert, scaled_too, out, stream);
    case Coding::kInt4:
      return unpack<Coding::kInt4, false>(w, expert, scaled_too, out, stream);
    case Coding::kInt8:
      return unpack<Coding::kInt8, false>(w, expert, scaled_too, out, stream);
  }
}

}  // namespace fd::cuda

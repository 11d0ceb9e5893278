// A few tokens (compute capability 9.0 and up): the whole of the experts in one persistent launch.
//
// Work is the list of chunks of all experts in use, in order of expert, block and K; every warp of
// the grid takes an equal run of it, through a ring that a feeding warp fills by bulk copies, also
// across the barrier between the two products. A run begins and ends anywhere in a block's K: the
// warp first computes the head of its last block and hands the sums to the warp behind it, then
// whole blocks, then the tail of its first block on top of the sums that it was handed. So a chain
// goes from the first row of K to the last (canonical.cuh), and nobody waits: heads come first.
#pragma once

#include "barrier.cuh"
#include "canonical.cuh"
#include "stream.h"

namespace fd::cuda {

namespace stream {

constexpr int kThreads = (kStreamWarps + 1) * kWarp;
constexpr int kConsumers = kStreamWarps * kWarp;

/// Experts in use, each with at most kStreamGroup of its slots.
struct Groups {
  int count;
  int expert[kStreamSlots];
  int first[kStreamSlots + 1];  // into slots
  int slots[kStreamSlots];
};

/// First part of shared memory; rings, barriers and rows of x follow.
struct Head {
  Groups groups;
  float tops[kStreamRows][kStreamWarps];
  int row_source[kStreamSlots];  // rows in shared memory: token or slot
  float row_inverse[kStreamRows];
};

constexpr int round_up(int value, int unit) { return (value + unit - 1) / unit * unit; }
constexpr int kHeadBytes = round_up(static_cast<int>(sizeof(Head)), 128);
static_assert(kHeadBytes + kStreamWarps * 4 * 16 + 256 <= kStreamFixedBytes);
static_assert(kStreamChunkK == kChunkK);

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

__device__ __forceinline__ void consumers_sync() {
  asm volatile("bar.sync 1, %0;" ::"n"(kConsumers) : "memory");
}

/// Sorts the slots by expert and cuts runs of an expert into groups. All threads. A group has no
/// more slots than there are tokens: that is what rows of x have room for, whatever the ids are.
__device__ inline void find_groups(const ExpertsCall& call, Head& head) {
  __shared__ int experts[kStreamSlots];
  Groups& groups = head.groups;
  const int slots = call.tokens * call.top_k, i = threadIdx.x;
  const int most = min(call.tokens, kStreamGroup);
  if (i < slots) experts[i] = __ldg(call.ids + i);
  __syncthreads();
  int rank = 0, place = 0, groups_before = 0;
  if (i < slots) {
    const int mine = experts[i];
    for (int j = 0; j < slots; ++j) {
      const int other = experts[j];
      rank += other < mine || (other == mine && j < i);
      place += other == mine && j < i;
    }
    groups.slots[rank] = i;
  }
  __syncthreads();
  if (i < slots) {
    // a group begins at each slot whose place among those of its expert is a multiple
    head.row_source[rank] = place % most == 0;
  }
  __syncthreads();
  if (i < slots && head.row_source[rank] != 0) {
    for (int j = 0; j < rank; ++j) groups_before += head.row_source[j];
    groups.expert[groups_before] = experts[i];
    groups.first[groups_before] = rank;
  }
  const int total = __syncthreads_count(i < slots && place % most == 0);
  if (i == 0) {
    groups.count = total;
    groups.first[total] = slots;
  }
  __syncthreads();
}

/// The chunks of one warp in one product: up to three ranges, in the order described above.
struct Walk {
  int begin[3], end[3];

  __device__ static int bound(int64_t chunks, int warp, int warps) {
    return static_cast<int>(chunks * warp / warps);
  }

  /// The warp that has chunk `chunk`.
  __device__ static int owner(int64_t chunks, int chunk, int warps) {
    return static_cast<int>(((chunk + int64_t{1}) * warps - 1) / chunks);
  }

  __device__ Walk(int total, int of_block, int warp, int warps) {
    const int from = bound(total, warp, warps), to = bound(total, warp + 1, warps);
    const int whole_from = (from + of_block - 1) / of_block * of_block;
    const int whole_to = to / of_block * of_block;
    const bool inside = whole_from > whole_to;  // all of it in one block, touching neither end
    begin[0] = inside ? to : max(whole_to, from);
    end[0] = to;
    begin[1] = whole_from;
    end[1] = inside ? whole_from : whole_to;
    begin[2] = from;
    end[2] = inside ? to : min(whole_from, to);
  }
};

struct Shape {
  int of_block, blocks, of_group, total;  // in chunks, but for `blocks`

  __device__ Shape(const ExpertWeight& w, int groups)
      : of_block(w.chunks_of_k()),
        blocks(w.blocks()),
        of_group(of_block * blocks),
        total(of_group * groups) {}
};

/// One feeding lane: the copies of one multiplying warp's ring, in order.
template <Coding kCoding>
struct Feeder {
  static constexpr int kChunk = chunk_bytes(kCoding);
  const StreamJob& job;
  const Groups& groups;
  int warp, warps;  // of the grid
  int product = -1, range = 3, at = 0, end = 0;

  __device__ const ExpertWeight& weight() const {
    return product == 0 ? job.call.up_gate : job.call.down;
  }

  /// Moves to the next range that is not empty; false at the end of all.
  __device__ bool advance() {
    while (at == end) {
      if (++range > 2) {
        if (++product > 1) return false;
        range = 0;
      }
      const Shape shape(weight(), groups.count);
      const Walk walk(shape.total, shape.of_block, warp, warps);
      at = range == 0 ? walk.begin[0] : range == 1 ? walk.begin[1] : walk.begin[2];
      end = range == 0 ? walk.end[0] : range == 1 ? walk.end[1] : walk.end[2];
    }
    return true;
  }

  /// Chunks of the next copy: within a range and an expert.
  __device__ int next(const uint8_t*& from) {
    const ExpertWeight& w = weight();
    const int of_group = w.chunks_of_k() * w.blocks();
    const int group = at / of_group, inside = at - group * of_group;
    const int count = min(min(job.copy_chunks, end - at), of_group - inside);
    from = w.chunks + (int64_t{groups.expert[group]} * of_group + inside) * kChunk;
    at += count;
    return count;
  }
};

struct Rings {
  uint32_t bytes, barriers;  // of warp 0; barriers: {full, free} a slot
  int slot_bytes, stages;

  __device__ uint32_t slot(int warp, int stage) const {
    return bytes + (warp * stages + stage) * slot_bytes;
  }
  __device__ uint32_t full(int warp, int stage) const {
    return barriers + (warp * stages + stage) * 16;
  }
  __device__ uint32_t free(int warp, int stage) const { return full(warp, stage) + 8; }
};

__device__ __forceinline__ bool barrier_done(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n.reg .pred p;\nmbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n}\n"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done != 0;
}

/// The feeding warp: lane l serves multiplying warp l.
template <Coding kCoding>
__device__ void feed(const StreamJob& job, const Groups& groups, const Rings& rings) {
  const int lane = threadIdx.x % kWarp;
  const uint64_t policy = streaming_policy();
  Feeder<kCoding> feeder{job, groups, static_cast<int>(blockIdx.x) * kStreamWarps + lane,
                         static_cast<int>(gridDim.x) * kStreamWarps};
  bool active = lane < kStreamWarps && feeder.advance();
  RingPlace place;
  place.parity = 1;
  while (__any_sync(kFullMask, active)) {
    if (active && barrier_done(rings.free(lane, place.slot), place.parity)) {
      const uint8_t* from;
      const int bytes = feeder.next(from) * chunk_bytes(kCoding);
      const uint32_t full = rings.full(lane, place.slot);
      barrier_expect(full, bytes);
      bulk_copy(rings.slot(lane, place.slot), from, bytes, full, policy);
      place.next(rings.stages);
      active = feeder.advance();
    }
  }
}

__device__ __forceinline__ uint4 load_shared(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address));
  return v;
}

/// A multiplying warp.
template <Coding kCoding>
struct Stream {
  const StreamJob& job;
  Head& head;
  Rings rings;
  uint32_t rows;  // rows of x in shared memory
  Registers held;
  int warp, lane, g, c;
  int grid_warp, grid_warps;
  RingPlace place;
  float sums[4];

  __device__ Stream(const StreamJob& j, Head& h, const Rings& r, uint32_t x)
      : job(j),
        head(h),
        rings(r),
        rows(x),
        held(static_cast<uint32_t>(j.call.top_k) >> 30),
        warp(threadIdx.x / kWarp),
        lane(threadIdx.x % kWarp),
        g(lane / 4),
        c(lane % 4),
        grid_warp(blockIdx.x * kStreamWarps + warp),
        grid_warps(gridDim.x * kStreamWarps) {}

  /// One chunk: 512 rows onto the sums. `x`: this lane's row of x at the chunk.
  template <bool kExact>
  __device__ __forceinline__ void add_chunk(uint32_t chunk, uint32_t x,
                                            const LaneCode<kExact>& code) {
    uint32_t pairs[2] = {0, 0};
    if constexpr (kCoding == Coding::kCcq) {
      asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];"
                   : "=r"(pairs[0]), "=r"(pairs[1])
                   : "r"(chunk + g * 8));
    }
    const uint32_t tiles = chunk + scale_bytes(kCoding) + lane * 16;
    add_tile<kExact, 0>(tiles, x, pairs[0], code);
    add_tile<kExact, 1>(tiles, x, pairs[0], code);
    add_tile<kExact, 2>(tiles, x, pairs[1], code);
    add_tile<kExact, 3>(tiles, x, pairs[1], code);
  }

  template <bool kExact, int kTile>
  __device__ __forceinline__ void add_tile(uint32_t tiles, uint32_t x, uint32_t pairs,
                                           const LaneCode<kExact>& code) {
    LaneTile<kCoding, kExact> tile;
#pragma unroll
    for (int i = 0; i < lane_vectors(kCoding); ++i) {
      tile.v[i] = load_shared(tiles + kTile * tile_size(kCoding) + i * 512);
    }
    GroupScale scale[2];
    if constexpr (kCoding == Coding::kCcq) {
      scale[0] = GroupScale::of<kTile % 2 * 2>(pairs, held);
      scale[1] = GroupScale::of<kTile % 2 * 2 + 1>(pairs, held);
    }
    add_part<kExact, kTile, 0>(tile, x, scale[0], code);
    add_part<kExact, kTile, 1>(tile, x, scale[0], code);
    add_part<kExact, kTile, 2>(tile, x, scale[1], code);
    add_part<kExact, kTile, 3>(tile, x, scale[1], code);
  }

  template <bool kExact, int kTile, int kPart>
  __device__ __forceinline__ void add_part(LaneTile<kCoding, kExact>& tile, uint32_t x,
                                           const GroupScale& scale, const LaneCode<kExact>& code) {
    const uint4 b = load_shared(x + kTile * 256 + kPart * 64);
    uint32_t a[2][4];
    tile.template decode<kPart, 0>(code, scale, held, a[0]);
    tile.template decode<kPart, 1>(code, scale, held, a[1]);
    mma_f16(sums, a[0], b.x, b.y);
    mma_f16(sums, a[1], b.z, b.w);
  }

  struct At {
    int group, block, chunk;  // chunk of the block
  };

  __device__ At locate(const Shape& shape, int index) const {
    const int group = index / shape.of_group, rest = index - group * shape.of_group;
    return {group, rest / shape.of_block, rest % shape.of_block};
  }

  /// Chunks begin .. end of one range.
  __device__ void multiply_range(int product, const Shape& shape, int begin, int end,
                                 int first_row) {
    if (begin >= end) return;
    const ExpertWeight& w = product == 0 ? job.call.up_gate : job.call.down;
    const int row_stride = w.padded_k() * 2 + kStreamRowGap;
    At at = locate(shape, begin);
    clear();
    if (at.chunk > 0) take_sums(product, Walk::owner(shape.total, begin - 1, grid_warps));
    int in_copy = 0, copied = 0;  // chunks used and held of the ring's slot
    LaneCode<false> fast;
    LaneCode<true> exact;
    bool proven = true, fresh = true;
    uint32_t x_row = 0;
    for (int index = begin; index < end; ++index) {
      if (fresh) {
        const int64_t column =
            (int64_t{head.groups.expert[at.group]} * shape.blocks + at.block) * kBlockColumns + g;
        if constexpr (kCoding == Coding::kCcq) {
          fast.load(w.codes, w.exact, column);
          const bool mine =
              __ldg(&w.codes[column].proven) != 0 && __ldg(&w.codes[column + 8].proven) != 0;
          proven = __all_sync(kFullMask, mine);
          if (!proven) exact.load(w.codes, w.exact, column);
        }
        x_row = rows + row_of(product, at.group, first_row, g) * row_stride + c * 16;
        fresh = false;
      }
      if (in_copy == copied) {
        copied = min(min(job.copy_chunks, end - index),
                     shape.of_group - at.block * shape.of_block - at.chunk);
        in_copy = 0;
        barrier_wait(rings.full(warp, place.slot), place.parity);
      }
      const uint32_t chunk = rings.slot(warp, place.slot) + in_copy * chunk_bytes(kCoding);
      const uint32_t x = x_row + at.chunk * (kChunkK * 2);
      if (kCoding != Coding::kCcq || proven) {
        add_chunk<false>(chunk, x, fast);
      } else {
        add_chunk<true>(chunk, x, exact);
      }
      if (++in_copy == copied) {
        __syncwarp();
        if (lane == 0) barrier_arrive(rings.free(warp, place.slot));
        place.next(rings.stages);
        in_copy = copied = 0;
      }
      if (++at.chunk == shape.of_block) {
        finish_block(product, w, at);
        clear();
        at.chunk = 0;
        fresh = true;
        if (++at.block == shape.blocks) at.block = 0, ++at.group;
      }
    }
    if (at.chunk > 0) hand_sums(product);
  }

  /// Asks for the columns' numbers of all blocks that this warp will work on, so that the start of
  /// a block waits for the L2 cache at most.
  __device__ void prefetch_columns(int product) const {
    const ExpertWeight& w = product == 0 ? job.call.up_gate : job.call.down;
    const Shape shape(w, head.groups.count);
    const int from = Walk::bound(shape.total, grid_warp, grid_warps);
    const int to = Walk::bound(shape.total, grid_warp + 1, grid_warps);
    const int first = from / shape.of_block, last = (to - 1) / shape.of_block;
    for (int i = first + lane / 4; from < to && i <= last; i += kWarp / 4) {
      const int group = i / shape.blocks, block = i - group * shape.blocks;
      const int64_t column =
          (int64_t{head.groups.expert[group]} * shape.blocks + block) * kBlockColumns;
      if (kCoding == Coding::kCcq && lane % 2 == 0) {
        prefetch(w.codes + column + lane % 4 * (kBlockColumns / 4));
      }
      if (lane % 4 == 1) prefetch(w.column_scale + column);
    }
  }

  __device__ static void prefetch(const void* p) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
  }

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[i] = 0.0f;
  }

  /// Row in shared memory of the group's token `column`; of some token past the last.
  __device__ int row_of(int product, int group, int first_row, int column) const {
    const Groups& groups = head.groups;
    const int at = min(groups.first[group] + column, groups.first[group + 1] - 1);
    return product == 0 ? groups.slots[at] / job.call.top_k : at - first_row;
  }

  __device__ void hand_sums(int product) {
    const int at = product * grid_warps + grid_warp;
    __stcg(job.state.sums + at * kWarp + lane, make_float4(sums[0], sums[1], sums[2], sums[3]));
    __threadfence();
    __syncwarp();
    if (lane == 0) {
      asm volatile("st.release.gpu.global.u32 [%0], 1;" ::"l"(job.state.flags + at) : "memory");
    }
  }

  /// `previous`: the warp whose run ends where this range begins.
  __device__ void take_sums(int product, int previous) {
    const int at = product * grid_warps + previous;
    uint32_t ready = 0;
    do {
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
                   : "=r"(ready)
                   : "l"(job.state.flags + at)
                   : "memory");
    } while (ready == 0);
    const float4 v = __ldcg(job.state.sums + at * kWarp + lane);
    sums[0] = v.x, sums[1] = v.y, sums[2] = v.z, sums[3] = v.w;
    __syncwarp();
    if (lane == 0) job.state.flags[at] = 0;
  }

  /// The block's values for the tokens of columns 2c and 2c + 1.
  __device__ void finish_block(int product, const ExpertWeight& w, const At& at) {
    const Groups& groups = head.groups;
    const int64_t column =
        (int64_t{groups.expert[at.group]} * shape_blocks(w) + at.block) * kBlockColumns + g;
    const float low = __ldg(w.column_scale + column), high = __ldg(w.column_scale + column + 8);
    const int half = w.out_features / 2, n = at.block * 8 + g;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int token = 2 * c + i, index = groups.first[at.group] + token;
      if (index >= groups.first[at.group + 1]) continue;
      const int slot = groups.slots[index];
      const float inverse = head.row_inverse[row_of(product, at.group, first_row_, token)];
      const float first = scaled(sums[i], low, inverse),
                  second = scaled(sums[2 + i], high, inverse);
      if (product == 0) {
        store(job.state.inner + int64_t{slot} * half + n, swiglu(first, second));
      } else {
        store(job.state.outputs + int64_t{slot} * w.out_features + n, first);
        store(job.state.outputs + int64_t{slot} * w.out_features + half + n, second);
      }
    }
  }

  __device__ static int shape_blocks(const ExpertWeight& w) { return w.blocks(); }

  __device__ static void store(bf16* to, float value) {
    __stcg(reinterpret_cast<unsigned short*>(to), __bfloat16_as_ushort(__float2bfloat16_rn(value)));
  }

  /// Rows of x, named in head.row_source, to shared memory as float16. All multiplying warps.
  __device__ void load_rows(const bf16* from, int count, int width, int padded) {
    const int stride = padded * 2 + kStreamRowGap;
    for (int r = 0; r < count; ++r) {
      const uint4* row = reinterpret_cast<const uint4*>(from + int64_t{head.row_source[r]} * width);
      float top = 0.0f;
      for (int i = threadIdx.x; i < width / 8; i += kConsumers)
        top = fmaxf(top, largest_of(__ldcg(row + i)));
      top = warp_max(top);
      if (lane == 0) head.tops[r][warp] = top;
    }
    consumers_sync();
    for (int r = 0; r < count; ++r) {
      const uint4* row = reinterpret_cast<const uint4*>(from + int64_t{head.row_source[r]} * width);
      const float top = warp_max(lane < kStreamWarps ? head.tops[r][lane] : 0.0f);
      const float factor = row_scale(top);
      if (threadIdx.x == 0) head.row_inverse[r] = inverse_scale(factor);
      for (int i = threadIdx.x; i < padded / 8; i += kConsumers) {
        const uint4 v = to_slots(i < width / 8 ? __ldcg(row + i) : make_uint4(0, 0, 0, 0), factor);
        asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(rows + r * stride + i * 16),
                     "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                     : "memory");
      }
    }
    consumers_sync();
  }

  __device__ void multiply(int product) {
    const ExpertWeight& w = product == 0 ? job.call.up_gate : job.call.down;
    const Shape shape(w, head.groups.count);
    const Walk walk(shape.total, shape.of_block, grid_warp, grid_warps);
    first_row_ = 0;
    int count = job.call.tokens;
    const bf16* from = job.call.x;
    if (product == 1) {
      // slots of the groups that the block's warps touch
      const int begin = Walk::bound(shape.total, blockIdx.x * kStreamWarps, grid_warps);
      const int end = Walk::bound(shape.total, (blockIdx.x + 1) * kStreamWarps, grid_warps);
      first_row_ = head.groups.first[min(begin / shape.of_group, head.groups.count - 1)];
      count = end > begin ? head.groups.first[(end - 1) / shape.of_group + 1] - first_row_ : 0;
      from = job.state.inner;
    }
    if (threadIdx.x < count) {
      head.row_source[threadIdx.x] =
          product == 0 ? threadIdx.x : head.groups.slots[first_row_ + threadIdx.x];
    }
    consumers_sync();
    load_rows(from, count, w.in_features, w.padded_k());
#pragma unroll 1
    for (int i = 0; i < 3; ++i) {
      const int begin = i == 0 ? walk.begin[0] : i == 1 ? walk.begin[1] : walk.begin[2];
      const int end = i == 0 ? walk.end[0] : i == 1 ? walk.end[1] : walk.end[2];
      multiply_range(product, shape, begin, end, first_row_);
    }
  }

  /// Until all blocks have come: the last one starts a new generation.
  __device__ void grid_barrier() {
    __threadfence();
    consumers_sync();
    if (threadIdx.x == 0) {
      unsigned* const arrived = job.state.barrier;
      unsigned* const generation = arrived + 1;
      unsigned before, now;
      asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];"
                   : "=r"(before)
                   : "l"(generation)
                   : "memory");
      asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;"
                   : "=r"(now)
                   : "l"(arrived)
                   : "memory");
      if (now == gridDim.x - 1) {
        *arrived = 0;
        __threadfence();
        asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(generation), "r"(before + 1)
                     : "memory");
      } else {
        do {
          asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
                       : "=r"(now)
                       : "l"(generation)
                       : "memory");
        } while (now == before);
      }
    }
    consumers_sync();
  }

  /// out[t] = sum of weighted outputs in order of the slots.
  __device__ void combine() const {
    const int width = job.call.down.out_features, pairs = width / 2, top_k = job.call.top_k;
    const int total = job.call.tokens * pairs;
    for (int i = blockIdx.x * kConsumers + threadIdx.x; i < total; i += gridDim.x * kConsumers) {
      const int t = i / pairs;
      const uint32_t* row = reinterpret_cast<const uint32_t*>(job.state.outputs) +
                            int64_t{t} * top_k * pairs + i % pairs;
      float low = 0.0f, high = 0.0f;
#pragma unroll 8
      for (int j = 0; j < top_k; ++j) {
        const float weight = __ldg(job.call.route_weights + t * top_k + j);
        const float2 v = unpack_bf16(__ldcg(row + int64_t{j} * pairs));
        low = __fmaf_rn(weight, v.x, low);
        high = __fmaf_rn(weight, v.y, high);
      }
      reinterpret_cast<uint32_t*>(job.call.out)[i] = pack_bf16(low, high);
    }
  }

  __device__ void run() {
    prefetch_columns(0);
    prefetch_columns(1);
    multiply(0);
    grid_barrier();
    multiply(1);
    grid_barrier();
    combine();
  }

 private:
  int first_row_ = 0;
};

#endif

template <Coding kCoding>
__global__ void __launch_bounds__(kThreads, 1)
    stream_kernel(const __grid_constant__ StreamJob job) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) uint8_t memory[];
  Head& head = *reinterpret_cast<Head*>(memory);
  const int slot_bytes = job.copy_chunks * chunk_bytes(kCoding);
  const uint32_t barriers = shared_address(memory) + kHeadBytes;
  const int slots = kStreamWarps * job.stages;
  const uint32_t ring = barriers + round_up(slots * 16, 128);
  const Rings rings{ring, barriers, slot_bytes, job.stages};
  const uint32_t rows = ring + round_up(slots * slot_bytes, 128);
  for (int i = threadIdx.x; i < 2 * slots; i += kThreads) barrier_init(barriers + i * 8, 1);
  barrier_publish();
  find_groups(job.call, head);
  if (threadIdx.x >= kConsumers) {
    feed<kCoding>(job, head.groups, rings);
  } else {
    Stream<kCoding>(job, head, rings, rows).run();
  }
#endif
}

}  // namespace stream

template <Coding kCoding>
void launch_stream_of(const StreamJob& job, int multiprocessors, cudaStream_t queue) {
  auto kernel = stream::stream_kernel<kCoding>;
  const int bytes = stream_shared_bytes(job.call, job.stages, job.copy_chunks, job.row_bytes);
  check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
        "stream_experts: shared memory");
  cudaLaunchConfig_t config{};
  config.gridDim = multiprocessors;
  config.blockDim = stream::kThreads;
  config.dynamicSmemBytes = bytes;
  config.stream = queue;
  cudaLaunchAttribute together;  // blocks wait for each other
  together.id = cudaLaunchAttributeCooperative;
  together.val.cooperative = 1;
  config.attrs = &together;
  config.numAttrs = 1;
  check(cudaLaunchKernelEx(&config, kernel, job), "stream_experts");
}

}  // namespace fd::cuda

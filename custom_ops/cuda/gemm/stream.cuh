// A few tokens (compute capability 9.0 and up): the whole of the experts in one persistent launch.
//
// Work is the list of chunks of all experts in use, in order of expert, block and K; every warp of
// the grid takes an equal run of it, through a ring of its own that it keeps full by bulk copies,
// also while it waits for the first product's rows. A run begins and ends anywhere in a block's K:
// the warp first computes the head of its last block and hands the sums to the warp behind it, then
// whole blocks, then the tail of its first block on top of the sums that it was handed. So a chain
// goes from the first row of K to the last (canonical.cuh), and nobody waits: heads come first.
//
// Nothing waits for the whole grid: the second product of an expert starts when the first one's
// blocks of columns have been counted, and the warp that completes a block of columns of the output
// sums it over the experts.
#pragma once

#include <type_traits>

#include "canonical.cuh"
#include "ring.cuh"
#include "stream.h"
#include "stream_rows.cuh"
#include "stream_work.cuh"

namespace fd::cuda {

namespace stream {

constexpr int round_up(int value, int unit) { return (value + unit - 1) / unit * unit; }
static_assert(kStreamChunkK == kChunkK);

/// A warp's ring: slots of copy_chunks chunks, and a barrier each that its copy completes.
struct Ring {
  uint32_t slots, barriers;
  int slot_bytes, stages, copy_chunks;

  __device__ uint32_t slot(int stage) const { return slots + stage * slot_bytes; }
  __device__ uint32_t full(int stage) const { return barriers + stage * 8; }
};

/// First part of shared memory; rows of x and rings follow.
struct Head {
  float4 handed[kStreamWarps][kWarp];              // sums for the block's next warp
  uint64_t handed_full[2][kStreamWarps];           // barriers of both products: they have come
  uint64_t full[kStreamWarps][kStreamMostStages];  // barriers of the rings: a copy has come
  Groups groups;
  int bounds[2][kStreamWarps + 1];  // chunks of both products where the warps' runs begin
  Share shares[2];
  Stretch stretches[2][kStreamWarps][kMostStretches];  // in order
  int stretch_counts[2][kStreamWarps];
  int most_rows[2];  // of a round of each product
  StreamRoom room;
  bool by_token;               // rows of the first product are those of all tokens
  unsigned tops[kStreamRows];  // bits of the largest magnitude of each row
  float row_inverse[kStreamRows];
};

constexpr int kHeadBytes = round_up(static_cast<int>(sizeof(Head)), 128);
static_assert(kHeadBytes + 512 <= kStreamFixedBytes);

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

/// The copies of a warp's ring, in order; one lane.
template <Coding kCoding>
struct Feeder {
  static constexpr int kChunk = chunk_bytes(kCoding);
  const uint8_t* from = nullptr;  // of the next copy
  int left = 0;                   // chunks of the stretch
  int next = 0;                   // stretch; those of the second product follow

  /// Moves to the next stretch; false behind the last one.
  __device__ bool advance(const StreamJob& job, const Head& head, int warp) {
    const int first = head.stretch_counts[0][warp];
    const int product = next < first ? 0 : 1, at = next - (product == 0 ? 0 : first);
    if (at >= head.stretch_counts[product][warp]) return false;
    const Stretch stretch = head.stretches[product][warp][at];
    const ExpertWeight& w = product == 0 ? job.call.up_gate : job.call.down;
    const int of_group = w.chunks_of_k() * w.blocks();
    const int inside = stretch.begin - stretch.group * of_group;
    from = w.chunks + (int64_t{head.groups.expert[stretch.group]} * of_group + inside) * kChunk;
    left = stretch.end - stretch.begin;
    ++next;
    return true;
  }

  /// Starts the next copy, if there is one.
  __device__ void copy(const StreamJob& job, const Head& head, int warp, int copy_chunks,
                       uint32_t slot, uint32_t full, uint64_t policy) {
    if (left == 0 && !advance(job, head, warp)) return;
    const int count = min(copy_chunks, left);
    barrier_expect(full, count * kChunk);
    bulk_copy(slot, from, count * kChunk, full, policy);
    from += count * kChunk;
    left -= count;
  }
};

template <Coding kCoding>
struct Stream {
  static constexpr int kChunk = chunk_bytes(kCoding);
  const StreamJob& job;
  Head& head;
  Ring ring;
  uint32_t rows;  // rows of x in shared memory
  Registers held;
  int warp, lane, g, c;
  uint64_t policy;
  Feeder<kCoding> feeder;
  RingPlace place;
  uint32_t chunk = 0;  // where the next chunk lies in the ring's slot
  int slot_left = 0;   // chunks of the slot from there on
  float sums[4];
  int first_row = 0;      // sorted slot of the first row in shared memory
  bool by_token = false;  // rows are those of all tokens
  bool filled = false;    // the ring

  __device__ Stream(const StreamJob& j, Head& h)
      : job(j),
        head(h),
        rows(shared_address(&h) + kHeadBytes),
        held(static_cast<uint32_t>(j.call.top_k) >> 30),
        warp(threadIdx.x / kWarp),
        lane(threadIdx.x % kWarp),
        g(lane / 4),
        c(lane % 4),
        policy(streaming_policy()) {}

  __device__ const ExpertWeight& weight(int product) const {
    return product == 0 ? job.call.up_gate : job.call.down;
  }

  // -- one chunk: 512 rows onto the sums ----------------------------------------------------------

  /// `x`: this lane's row of x at the chunk.
  template <typename Code>
  __device__ __forceinline__ void add_chunk(uint32_t x, const Code& code) {
    const uint32_t tiles = chunk + scale_bytes(kCoding) + lane * 16;
    if constexpr (std::is_same_v<Code, LaneCode<false>>) {
      add_half(chunk + g * 8, tiles, x, code);
      add_half(chunk + g * 8 + 4, tiles + 2 * tile_size(kCoding), x + 512, code);
    } else {
      // seldom run: half the code to fetch
#pragma unroll 1
      for (int half = 0; half < 2; ++half) {
        add_half(chunk + g * 8 + 4 * half, tiles + half * 2 * tile_size(kCoding), x + half * 512,
                 code);
      }
    }
  }

  /// Two tiles; `scales`: of this lane's columns.
  template <typename Code>
  __device__ __forceinline__ void add_half(uint32_t scales, uint32_t tiles, uint32_t x,
                                           const Code& code) {
    uint32_t pairs = 0;
    if constexpr (kCoding == Coding::kCcq) pairs = load_shared_word(scales);
    add_tile<0>(tiles, x, pairs, code);
    add_tile<1>(tiles, x, pairs, code);
  }

  template <int kTile, typename Code>
  __device__ __forceinline__ void add_tile(uint32_t tiles, uint32_t x, uint32_t pairs,
                                           const Code& code) {
    LaneTileOf<kCoding, Code> tile;
#pragma unroll
    for (int i = 0; i < lane_vectors(kCoding); ++i) {
      tile.v[i] = load_shared(tiles + kTile * tile_size(kCoding) + i * 512);
    }
    GroupScale scale[2];
    if constexpr (kCoding == Coding::kCcq) {
      scale[0] = GroupScale::of<kTile % 2 * 2>(pairs, held);
      scale[1] = GroupScale::of<kTile % 2 * 2 + 1>(pairs, held);
    }
    add_part<kTile, 0>(tile, x, scale[0], code);
    add_part<kTile, 1>(tile, x, scale[0], code);
    add_part<kTile, 2>(tile, x, scale[1], code);
    add_part<kTile, 3>(tile, x, scale[1], code);
  }

  template <int kTile, int kPart, typename Code>
  __device__ __forceinline__ void add_part(LaneTileOf<kCoding, Code>& tile, uint32_t x,
                                           const GroupScale& scale, const Code& code) {
    const uint4 b = load_shared(x + kTile * 256 + kPart * 64);
    uint32_t a[2][4];
    tile.template decode<kPart, 0>(code, scale, held, a[0]);
    tile.template decode<kPart, 1>(code, scale, held, a[1]);
    mma_f16(sums, a[0], b.x, b.y);
    mma_f16(sums, a[1], b.z, b.w);
  }

  // -- runs of chunks -----------------------------------------------------------------------------

  /// The next `count` chunks, of one block of columns; `left`: of the stretch.
  template <typename Code>
  __device__ __forceinline__ void add_chunks(int count, int left, uint32_t x, const Code& code) {
    while (count > 0) {
      if (slot_left == 0) {
        slot_left = min(ring.copy_chunks, left);
        chunk = ring.slot(place.slot);
        barrier_wait(ring.full(place.slot), place.parity);
      }
      const int now = min(slot_left, count);
      slot_left -= now;
      count -= now;
      left -= now;
#pragma unroll 1
      for (int i = 0; i < now; ++i) {
        add_chunk(x, code);
        x += kChunkK * 2;
        chunk += kChunk;
      }
      if (slot_left == 0) {
        __syncwarp();
        if (elected()) feed();
        place.next(ring.stages);
      }
    }
  }

  /// The next copy into the place that has been read.
  __device__ __forceinline__ void feed() {
    feeder.copy(job, head, warp, ring.copy_chunks, ring.slot(place.slot), ring.full(place.slot),
                policy);
  }

  __device__ void multiply_stretch(int product, const Stretch& stretch) {
    const ExpertWeight& w = weight(product);
    const int of_block = w.chunks_of_k(), blocks = w.blocks();
    const int group = stretch.group, row_stride = stream_row_bytes(w.in_features);
    const uint32_t x = rows + row_of(product, group, g) * row_stride + c * 16;
    const int first = stretch.begin - group * of_block * blocks;
    int block = first / of_block, at = first - block * of_block;
    int left = stretch.end - stretch.begin, finished = 0;
    clear();
    if (at > 0) take_sums(product, stretch.begin);
    while (left > 0) {
      const int count = min(left, of_block - at);
      add_block(w, (int64_t{head.groups.expert[group]} * blocks + block) * kBlockColumns + g, count,
                left, x + at * kChunkK * 2);
      left -= count;
      at += count;
      if (at < of_block) break;
      finish_block(product, w, group, block);
      clear();
      at = 0;
      ++block;
      ++finished;
    }
    if (product == 0 && finished > 0) count_blocks(group, finished);
    if (at > 0) hand_sums(product, stretch.end);
  }

  /// Chunks of one block; `column`: the first of this lane's two.
  __device__ __forceinline__ void add_block(const ExpertWeight& w, int64_t column, int count,
                                            int left, uint32_t x) {
    if constexpr (kCoding != Coding::kCcq) {
      add_chunks(count, left, x, LaneCode<false>());
    } else {
      const bool proven =
          __ldg(&w.codes[column].proven) != 0 && __ldg(&w.codes[column + 8].proven) != 0;
      if (__all_sync(kFullMask, proven)) {
        LaneCode<false> code;
        code.load(w.codes, w.exact, column);
        return add_chunks(count, left, x, code);
      }
      BoundedCode bounded;
      if (__all_sync(kFullMask, bounded.load(w.exact, column))) {
        return add_chunks(count, left, x, bounded);
      }
      LaneCode<true> code;
      code.load(w.codes, w.exact, column);
      add_chunks(count, left, x, code);
    }
  }

  /// Asks for the columns' numbers of all blocks that this warp will work on, so that the start of
  /// a block waits for the L2 cache at most.
  __device__ void prefetch_columns(int product) const {
    const ExpertWeight& w = weight(product);
    const int from = head.bounds[product][warp], to = head.bounds[product][warp + 1];
    const int of_block = w.chunks_of_k(), blocks = w.blocks();
    for (int i = from / of_block + lane / 4; i * of_block < to; i += kWarp / 4) {
      const int group = i / blocks, block = i - group * blocks;
      const int64_t column = (int64_t{head.groups.expert[group]} * blocks + block) * kBlockColumns;
      if (kCoding == Coding::kCcq && lane % 2 == 0) {
        prefetch(w.codes + column + lane % 4 * (kBlockColumns / 4));
      }
      if (lane % 4 == 1) prefetch(w.column_scale + column);
    }
  }

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[i] = 0.0f;
  }

  /// Row in shared memory of the group's token `column`; of some token past the last.
  __device__ int row_of(int product, int group, int column) const {
    const Groups& groups = head.groups;
    const int at = min(groups.first[group] + column, groups.first[group + 1] - 1);
    return product == 0 && by_token ? groups.tokens[at] : at - first_row;
  }

  // -- sums from warp to warp ---------------------------------------------------------------------

  __device__ uint4* global_sums(int product, int block) const {
    return job.state.sums + (product * gridDim.x + block) * kWarp + lane;
  }

  /// To the block's next warp in shared memory, to the next block in global memory. There bits are
  /// inverted: zero means that nothing has come yet, so that no flag and no fence is needed, and
  /// stands for a NaN that sums never are.
  __device__ void hand_sums(int product, int end) {
    if (end == head.bounds[product][kStreamWarps]) {
      uint32_t v[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i] = ~min(__float_as_uint(sums[i]), 0xfffffffeu);
      store_relaxed(global_sums(product, blockIdx.x), v);
    } else {
      head.handed[warp][lane] = make_float4(sums[0], sums[1], sums[2], sums[3]);
      barrier_arrive(shared_address(&head.handed_full[product][warp]));
    }
  }

  /// From the warp whose run ends where this range begins.
  __device__ void take_sums(int product, int begin) {
    if (begin == head.bounds[product][0]) {
      const Shape shape(weight(product), head.groups.count);
      uint4* const from = global_sums(product, shape.owner(begin - 1) / kStreamWarps);
      uint32_t v[4];
      do {
        load_relaxed(from, v);
      } while (v[0] == 0 || v[1] == 0 || v[2] == 0 || v[3] == 0);
      *from = make_uint4(0, 0, 0, 0);
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[i] = __uint_as_float(~v[i]);
    } else {
      int owner = warp - 1;
      while (head.bounds[product][owner] == begin) --owner;
      barrier_wait(shared_address(&head.handed_full[product][owner]), 0);
      const float4 v = head.handed[owner][lane];
      sums[0] = v.x, sums[1] = v.y, sums[2] = v.z, sums[3] = v.w;
    }
    __syncwarp();
  }

  // -- finished blocks ----------------------------------------------------------------------------

  /// The block's values for the tokens of columns 2c and 2c + 1.
  __device__ void finish_block(int product, const ExpertWeight& w, int group, int block) {
    const Groups& groups = head.groups;
    const int64_t column = (int64_t{groups.expert[group]} * w.blocks() + block) * kBlockColumns + g;
    const float low = __ldg(w.column_scale + column), high = __ldg(w.column_scale + column + 8);
    const int slots = job.call.tokens * job.call.top_k;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int token = 2 * c + i, index = groups.first[group] + token;
      if (index >= groups.first[group + 1]) continue;
      const int slot = groups.slots[index];
      const float inverse = head.row_inverse[row_of(product, group, token)];
      const float first = scaled(sums[i], low, inverse),
                  second = scaled(sums[2 + i], high, inverse);
      if (product == 0) {
        store(job.state.inner + int64_t{slot} * (w.out_features / 2) + block * 8 + g,
              swiglu(first, second));
      } else {
        bf16* const to = job.state.outputs + (int64_t{block} * slots + slot) * kBlockColumns + g;
        store(to, first);
        store(to + 8, second);
      }
    }
    if (product == 1) {
      __syncwarp();
      unsigned others = 0;  // groups that had finished this block; the last one leaves zero
      if (lane == 0) others = increment(job.state.columns + block, groups.count - 1);
      others = __shfl_sync(kFullMask, others, 0);
      if (static_cast<int>(others) == groups.count - 1) combine(block);
    }
  }

  __device__ static void store(bf16* to, float value) {
    __stcg(reinterpret_cast<unsigned short*>(to), __bfloat16_as_ushort(__float2bfloat16_rn(value)));
  }

  /// out[t] = sum of weighted outputs in order of the slots, for the columns of one block.
  __device__ void combine(int block) const {
    const int width = job.call.down.out_features, top_k = job.call.top_k, pair = lane % 8;
    const int column = (pair < 4 ? 0 : width / 2) + block * 8 + pair % 4 * 2;
    const uint32_t* const outputs = reinterpret_cast<const uint32_t*>(job.state.outputs) +
                                    int64_t{block} * job.call.tokens * top_k * (kBlockColumns / 2) +
                                    pair;
    for (int t = lane / 8; t < job.call.tokens; t += kWarp / 8) {
      float low = 0.0f, high = 0.0f;
#pragma unroll 8
      for (int j = t * top_k; j < (t + 1) * top_k; ++j) {
        const float weight = __ldg(job.call.route_weights + j);
        const float2 v = unpack_bf16(__ldcg(outputs + j * (kBlockColumns / 2)));
        low = __fmaf_rn(weight, v.x, low);
        high = __fmaf_rn(weight, v.y, high);
      }
      *reinterpret_cast<uint32_t*>(job.call.out + int64_t{t} * width + column) =
          pack_bf16(low, high);
    }
  }

  /// Tells those who wait that this warp has finished blocks of a group's first product.
  __device__ void count_blocks(int group, int finished) {
    __syncwarp();
    if (lane == 0) add_release(job.state.ready + group, finished);
  }

  // -- the two products ---------------------------------------------------------------------------

  /// Rows to shared memory as float16. All warps. A ring that has not been filled yet is filled as
  /// soon as the first loads are on their way: they would have to wait behind its copies.
  template <typename Source>
  __device__ __forceinline__ void convert_rows(int count, const ExpertWeight& w, Source source) {
    const int width = w.in_features, padded = w.padded_k();
    Rows part(padded);
    for (int first = 0; first < count || !filled; first += part.at_once) {
      part.load(first, count, width, source);
      if (!filled) fill();
      part.find_tops(first, count, width, head.tops);
      __syncthreads();
      part.store(first, count, padded, head.tops, rows, stream_row_bytes(width));
    }
    if (threadIdx.x < count) {
      head.row_inverse[threadIdx.x] =
          inverse_scale(row_scale(__uint_as_float(head.tops[threadIdx.x])));
    }
    __syncthreads();
    if (threadIdx.x < kStreamRows) head.tops[threadIdx.x] = 0;
  }

  /// The rows of a round's groups; those of the second product once they are complete.
  __device__ void take_rows(int product, const Round& round) {
    const ExpertWeight& w = weight(product);
    const Groups& groups = head.groups;
    if (product == 1 && round.first + static_cast<int>(threadIdx.x) <= round.last) {
      const unsigned* const ready = job.state.ready + round.first + threadIdx.x;
      while (load_acquire(ready) != job.call.up_gate.blocks()) {
      }
    }
    __syncthreads();  // and nobody reads the rows before any more
    first_row = groups.first[round.first];
    const bool tokens = product == 0 && by_token;
    const int count = tokens ? job.call.tokens : groups.first[round.last + 1] - first_row;
    const bf16* const from = product == 0 ? job.call.x : job.state.inner;
    convert_rows(count, w, [&](int row) {
      const int source = tokens         ? row
                         : product == 0 ? groups.tokens[first_row + row]
                                        : groups.slots[first_row + row];
      return reinterpret_cast<const uint4*>(from + int64_t{source} * w.in_features);
    });
  }

  __device__ void fill() {
    filled = true;
    prefetch_columns(0);
    if (elected()) {
      for (int i = 0; i < ring.stages; ++i) {
        feed();
        place.next(ring.stages);
      }
    }
    place = RingPlace();
    __syncwarp();
    prefetch_columns(1);
  }

  __device__ void multiply(int product) {
    const Share share = head.shares[product];
    Round round;
    int at = 0;
    while (round.next(share, head.groups, head.most_rows[product])) {
      take_rows(product, round);
      if (product == 1 && round.last == share.last) clear_counts();
      for (; at < head.stretch_counts[product][warp]; ++at) {
        const Stretch stretch = head.stretches[product][warp][at];
        if (stretch.group > round.last) break;
        multiply_stretch(product, stretch);
      }
    }
    if (!filled) fill();
    if (product == 1 && share.first > share.last) clear_counts();
  }

  /// When this block waits for no group any more: the last one to come here clears the counts.
  __device__ void clear_counts() {
    if (warp > 0) return;
    unsigned before = 0;
    if (lane == 0) before = increment(job.state.passed, gridDim.x - 1);
    if (__shfl_sync(kFullMask, before, 0) != gridDim.x - 1) return;
    for (int i = lane; i < head.groups.count; i += kWarp) job.state.ready[i] = 0;
  }

  /// What the block's warps work on, and where: lists in shared memory, as divisions cost more than
  /// the reading.
  __device__ void plan_work() {
    const Groups& groups = head.groups;
    if (threadIdx.x < 2 * (kStreamWarps + 1)) {
      const int product = threadIdx.x / (kStreamWarps + 1), i = threadIdx.x % (kStreamWarps + 1);
      const Shape shape(weight(product), groups.count);
      head.bounds[product][i] = shape.bound(blockIdx.x * kStreamWarps + i);
    }
    __syncthreads();
    if (threadIdx.x == 0) divide_room();
    __syncthreads();
    if (lane < 2) {
      const Shape shape(weight(lane), groups.count);
      Round round;
      int count = 0;
      while (round.next(head.shares[lane], groups, head.most_rows[lane])) {
        count = list_stretches(shape, round, head.bounds[lane][warp], head.bounds[lane][warp + 1],
                               head.stretches[lane][warp], count);
      }
      head.stretch_counts[lane][warp] = count;
    }
    __syncwarp();
    const StreamRoom room = head.room;
    ring.copy_chunks = room.copy_chunks;
    ring.stages = room.stages;
    ring.slot_bytes = room.copy_chunks * kChunk;
    ring.slots = rows + round_up(room.row_bytes, 128) + warp * room.stages * ring.slot_bytes;
    ring.barriers = shared_address(head.full[warp]);
    by_token = head.by_token;
  }

  /// Divides the block's memory between rows and rings by the rows that its groups need. One
  /// thread.
  __device__ void divide_room() {
    const Groups& groups = head.groups;
    int wanted[2], bytes[2];
#pragma unroll
    for (int product = 0; product < 2; ++product) {
      const ExpertWeight& w = weight(product);
      const int begin = head.bounds[product][0], end = head.bounds[product][kStreamWarps];
      const int of_group = w.chunks_of_k() * w.blocks(), first = begin / of_group;
      const Share share{first, begin < end ? (end - 1) / of_group : first - 1};
      head.shares[product] = share;
      wanted[product] =
          share.first > share.last
              ? 0
              : min(kStreamRows, groups.first[share.last + 1] - groups.first[share.first]);
      bytes[product] = stream_row_bytes(w.in_features);
    }
    by_token = job.call.tokens <= wanted[0];
    if (by_token) wanted[0] = job.call.tokens;
    const StreamRoom room =
        stream_room(job.room_bytes, kChunk, max(wanted[0] * bytes[0], wanted[1] * bytes[1]));
    by_token = by_token && job.call.tokens * bytes[0] <= room.row_bytes;
    head.room = room;
    head.by_token = by_token;
    head.most_rows[0] = by_token ? kStreamSlots : min(kStreamRows, room.row_bytes / bytes[0]);
    head.most_rows[1] = min(kStreamRows, room.row_bytes / bytes[1]);
  }

  __device__ void run() {
    if (threadIdx.x < kStreamRows) head.tops[threadIdx.x] = 0;
    if (threadIdx.x < 2 * kStreamWarps) {
      barrier_init(shared_address(&head.handed_full[0][threadIdx.x]), kWarp);
    }
    if (lane < kStreamMostStages) barrier_init(shared_address(&head.full[warp][lane]), 1);
    barrier_publish();
    find_groups(job.call, head.groups, reinterpret_cast<int*>(head.handed));
    plan_work();
#pragma unroll 1
    for (int product = 0; product < 2; ++product) {
      multiply(product);
    }
  }
};

#endif

template <Coding kCoding>
__global__ void __launch_bounds__(kThreads, 1)
    stream_kernel(const __grid_constant__ StreamJob job) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) uint8_t memory[];
  Stream<kCoding>(job, *reinterpret_cast<Head*>(memory)).run();
#endif
}

}  // namespace stream

template <Coding kCoding>
void launch_stream_of(const StreamJob& job, int multiprocessors, cudaStream_t queue) {
  auto kernel = stream::stream_kernel<kCoding>;
  const int bytes = stream::kHeadBytes + job.room_bytes + 128;
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

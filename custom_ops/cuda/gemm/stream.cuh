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
//
// What is computed of a chunk, and from what form of the rows, is an arithmetic's: Halves
// (stream_halves.cuh) or Digits (stream_digits.cuh).
#pragma once

#include "ring.cuh"
#include "stream.h"
#include "stream_digits.cuh"
#include "stream_halves.cuh"
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

template <typename Arithmetic>
struct Stream {
  static constexpr Coding kCoding = Arithmetic::kCoding;
  static constexpr int kChunk = chunk_bytes(kCoding);
  using Shape = stream::Shape<Arithmetic::kEven>;
  const StreamJob& job;
  Head& head;
  Ring ring;
  uint32_t rows;  // rows of x in shared memory
  Registers held;
  int warp, lane, g, c;
  uint64_t policy;
  Feeder<kCoding> feeder;
  RingPlace place;
  uint32_t chunk = 0;     // where the next chunk lies in the ring's slot
  int slot_left = 0;      // chunks of the slot from there on
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

  // -- runs of chunks -----------------------------------------------------------------------------

  /// The next `count` chunks, of one block of columns, onto the sums; `left`: of the stretch.
  template <typename Sums, typename Code>
  __device__ __forceinline__ void add_chunks(Sums& sums, int count, int left, const Code& code) {
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
        sums.add_chunk(chunk, code, held);
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
    const Groups& groups = head.groups;
    Arithmetic::with_sums(groups.rows(stretch.group),
                          [&](auto& sums) { multiply_stretch(product, stretch, sums); });
  }

  template <typename Sums>
  __device__ __forceinline__ void multiply_stretch(int product, const Stretch& stretch,
                                                   Sums& sums) {
    const ExpertWeight& w = weight(product);
    const int of_block = w.chunks_of_k(), blocks = w.blocks(), group = stretch.group;
    const int stride = Arithmetic::row_bytes(w.in_features);
    const auto row = [&](int token) { return rows + row_of(product, group, token) * stride; };
    const int first = stretch.begin - group * of_block * blocks;
    int block = first / of_block, at = first - block * of_block;
    int left = stretch.end - stretch.begin, finished = 0;
    sums.clear();
    if (at > 0) take_sums(product, stretch.begin, sums);
    while (left > 0) {
      const int count = min(left, of_block - at);
      const int64_t column = (int64_t{head.groups.expert[group]} * blocks + block) * kBlockColumns;
      sums.look_at(at, w.padded_k(), row);
      Arithmetic::with_code(w, column + g,
                            [&](const auto& code) { add_chunks(sums, count, left, code); });
      left -= count;
      at += count;
      if (at < of_block) break;
      sums.finish();
      finish_block(product, w, group, block, sums);
      sums.clear();
      at = 0;
      ++block;
      ++finished;
    }
    if (product == 0 && finished > 0) count_blocks(group, finished);
    if (at > 0) hand_sums(product, stretch.end, sums);
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

  /// Row in shared memory of the group's token `column`; of some token past the last.
  __device__ int row_of(int product, int group, int column) const {
    const Groups& groups = head.groups;
    const int at = min(groups.first[group] + column, groups.first[group + 1] - 1);
    return product == 0 && by_token ? groups.tokens[at] : at - first_row;
  }

  // -- sums from warp to warp ---------------------------------------------------------------------

  /// Whether a warp hands its sums to the next one of its block in shared memory.
  template <typename Sums>
  static constexpr bool kHandsInside = Sums::kFloats == 4;

  /// What a warp of the grid hands on.
  __device__ uint4* global_sums(int product, int owner) const {
    const int warps = gridDim.x * kStreamWarps;
    return job.state.sums + int64_t{product * warps + owner} * kStreamHanded * kWarp + lane;
  }

  /// To the block's next warp in shared memory, if they are few, else in global memory. There bits
  /// are inverted: zero means that nothing has come yet, so that no flag and no fence is needed,
  /// and stands for a NaN that sums never are.
  template <typename Sums>
  __device__ void hand_sums(int product, int end, const Sums& sums) {
    if (!kHandsInside<Sums> || end == head.bounds[product][kStreamWarps]) {
      uint4* const to = global_sums(product, blockIdx.x * kStreamWarps + warp);
#pragma unroll
      for (int part = 0; part < Sums::kFloats / 4; ++part) {
        uint32_t v[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          v[i] = ~min(__float_as_uint(sums.v[4 * part + i]), 0xfffffffeu);
        }
        store_relaxed(to + part * kWarp, v);
      }
    } else {
      head.handed[warp][lane] = make_float4(sums.v[0], sums.v[1], sums.v[2], sums.v[3]);
      barrier_arrive(shared_address(&head.handed_full[product][warp]));
    }
  }

  /// The warp whose run ends where this range begins.
  __device__ int owner_before(int product, int begin) const {
    if (begin == head.bounds[product][0]) {
      const Shape shape(weight(product), head.groups);
      return shape.owner(begin - 1);
    }
    int owner = warp - 1;
    while (head.bounds[product][owner] == begin) --owner;
    return blockIdx.x * kStreamWarps + owner;
  }

  template <typename Sums>
  __device__ void take_sums(int product, int begin, Sums& sums) {
    const int owner = owner_before(product, begin);
    if (!kHandsInside<Sums> || begin == head.bounds[product][0]) {
      uint4* const from = global_sums(product, owner);
#pragma unroll
      for (int part = 0; part < Sums::kFloats / 4; ++part) {
        uint32_t v[4];
        do {
          load_relaxed(from + part * kWarp, v);
        } while (v[0] == 0 || v[1] == 0 || v[2] == 0 || v[3] == 0);
        from[part * kWarp] = make_uint4(0, 0, 0, 0);
#pragma unroll
        for (int i = 0; i < 4; ++i) sums.v[4 * part + i] = __uint_as_float(~v[i]);
      }
    } else {
      const int inside = owner - blockIdx.x * kStreamWarps;
      barrier_wait(shared_address(&head.handed_full[product][inside]), 0);
      const float4 v = head.handed[inside][lane];
      sums.v[0] = v.x, sums.v[1] = v.y, sums.v[2] = v.z, sums.v[3] = v.w;
    }
    __syncwarp();
  }

  // -- finished blocks ----------------------------------------------------------------------------

  /// The block's values for this lane's tokens.
  template <typename Sums>
  __device__ __forceinline__ void finish_block(int product, const ExpertWeight& w, int group,
                                               int block, const Sums& sums) {
    const Groups& groups = head.groups;
    const int64_t column = (int64_t{groups.expert[group]} * w.blocks() + block) * kBlockColumns + g;
    const float low = __ldg(w.column_scale + column), high = __ldg(w.column_scale + column + 8);
    const int slots = job.call.tokens * job.call.top_k;
#pragma unroll
    for (int i = 0; i < Sums::kTokens; ++i) {
      const int token = Sums::token(i), index = groups.first[group] + token;
      if (index >= groups.first[group + 1]) continue;
      const int slot = groups.slots[index];
      const float inverse = head.row_inverse[row_of(product, group, token)];
      const float first = scaled(sums.value(i, 0), low, inverse),
                  second = scaled(sums.value(i, 1), high, inverse);
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
    const auto source = [&](int row) {
      const int at = tokens         ? row
                     : product == 0 ? groups.tokens[first_row + row]
                                    : groups.slots[first_row + row];
      return reinterpret_cast<const uint4*>(from + int64_t{at} * w.in_features);
    };
    // a ring that has not been filled yet is filled as soon as the first loads are on their way:
    // they would have to wait behind its copies
    const typename Arithmetic::Converter converter{head.tops, head.row_inverse};
    converter.convert(count, w.in_features, rows, source, [&] {
      if (!filled) fill();
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
    if constexpr (!Arithmetic::kEven) {
      if (warp == 0) add_costs(head.groups, Arithmetic::cost);
      __syncthreads();
    }
    if (threadIdx.x < 2 * (kStreamWarps + 1)) {
      const int product = threadIdx.x / (kStreamWarps + 1), i = threadIdx.x % (kStreamWarps + 1);
      const Shape shape(weight(product), groups);
      head.bounds[product][i] = shape.bound(blockIdx.x * kStreamWarps + i);
    }
    __syncthreads();
    if (threadIdx.x == 0) divide_room();
    __syncthreads();
    if (lane < 2) {
      const Shape shape(weight(lane), groups);
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
      bytes[product] = Arithmetic::row_bytes(w.in_features);
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

template <typename Arithmetic>
__global__ void __launch_bounds__(kThreads, 1)
    stream_kernel(const __grid_constant__ StreamJob job) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) uint8_t memory[];
  Stream<Arithmetic>(job, *reinterpret_cast<Head*>(memory)).run();
#endif
}

}  // namespace stream

template <typename Arithmetic>
void launch_stream_of(const StreamJob& job, int multiprocessors, cudaStream_t queue) {
  auto kernel = stream::stream_kernel<Arithmetic>;
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

// The experts of a MoE layer: memory and launches.
#include "experts.h"

#include <algorithm>
#include <mutex>
#include <stdexcept>

#include "../ops.h"
#include "jobs.cuh"
#include "stream.h"

namespace fd::cuda {
namespace {

constexpr int64_t kAlign = 256;

/// Cuts memory into aligned pieces; with a null start it only counts.
class Pieces {
 public:
  explicit Pieces(void* memory) : memory_(static_cast<uint8_t*>(memory)) {}

  template <typename T>
  T* take(int64_t count) {
    uint8_t* const at = memory_ == nullptr ? nullptr : memory_ + used_;
    used_ += ceil_div<int64_t>(count * sizeof(T), kAlign) * kAlign;
    return reinterpret_cast<T*>(at);
  }

  int64_t used() const { return used_; }

 private:
  uint8_t* memory_;
  int64_t used_ = 0;
};

int padded(int k) { return ceil_div(k, kChunkK) * kChunkK; }

struct SortedMemory {
  int* slot_of_row;
  int* token_of_row;
  int4* tiles;
  int* counts;  // tiles of two kinds, next items of the first product, of the second
  __half* x;
  float* x_scale;
  __half* inner;
  float* inner_scale;
  __nv_bfloat16* outputs;     // [slots][H]
  __nv_bfloat16* inner_bf16;  // the same memory, before the second product
  int64_t bytes;

  SortedMemory(void* memory, const ExpertsPlan& plan, const ExpertsShape& s) {
    const int64_t slots = int64_t{s.tokens} * s.top_k;
    Pieces pieces(memory);
    slot_of_row = pieces.take<int>(slots);
    token_of_row = pieces.take<int>(slots);
    tiles = pieces.take<int4>(plan.max_tiles);
    counts = pieces.take<int>(kSortCounts);
    x = pieces.take<__half>(int64_t{s.tokens} * padded(s.hidden));
    x_scale = pieces.take<float>(s.tokens);
    inner = pieces.take<__half>(slots * padded(s.inner));
    inner_scale = pieces.take<float>(slots);
    outputs = pieces.take<__nv_bfloat16>(slots * (s.hidden > s.inner ? s.hidden : s.inner));
    inner_bf16 = outputs;
    bytes = pieces.used();
  }
};

StreamState stream_state(void* memory, void* state, const ExpertsShape& s, const CardFacts& card,
                         int64_t* bytes) {
  const int64_t warps = int64_t{card.multiprocessors} * kStreamWarps;
  const int64_t slots = int64_t{s.tokens} * s.top_k;
  Pieces kept(state), pieces(memory);
  StreamState result{};
  result.barrier = kept.take<unsigned>(2);
  result.flags = kept.take<unsigned>(2 * warps);
  result.sums = pieces.take<float4>(2 * warps * kWarp);
  result.inner = pieces.take<__nv_bfloat16>(slots * s.inner);
  result.outputs = pieces.take<__nv_bfloat16>(slots * s.hidden);
  *bytes = pieces.used();
  return result;
}

ExpertsShape shape_of(const ExpertsCall& call) {
  return {call.tokens,           call.top_k,
          call.up_gate.experts,  call.up_gate.in_features,
          call.down.in_features, chunk_bytes(call.up_gate.coding)};
}

void run_sorted(const ExpertsPlan& plan, const ExpertsCall& call, void* memory,
                const CardFacts& card, cudaStream_t stream) {
  const ExpertsShape s = shape_of(call);
  const SortedMemory m(memory, plan, s);
  const int slots = s.tokens * s.top_k;
  const bool wgmma = plan.path == ExpertsPath::kTiles;
  const RowOrder order = wgmma ? RowOrder::kSlots : RowOrder::kEights;
  auto multiply = [&](const TilesJob& job) {
    if (wgmma) return tiles_wgmma(job, plan.tile_tokens, card.multiprocessors, stream);
    tiles_plain(job, plan.max_tiles, stream);
  };
  sort_slots(call.ids, slots, s.top_k, s.experts, plan.tile_tokens, m.slot_of_row, m.token_of_row,
             m.tiles, m.counts, stream);
  convert_rows(call.x, s.tokens, s.hidden, padded(s.hidden), order, m.x, m.x_scale, stream);
  multiply({call.up_gate, m.x, m.x_scale, m.slot_of_row, m.tiles, m.counts, m.counts + 2,
            m.token_of_row, true, m.inner_bf16});
  convert_rows(m.inner_bf16, slots, s.inner, padded(s.inner), order, m.inner, m.inner_scale,
               stream);
  multiply({call.down, m.inner, m.inner_scale, m.slot_of_row, m.tiles, m.counts, m.counts + 4,
            nullptr, false, m.outputs});
  combine(m.outputs, call.route_weights, call.out, s.tokens, s.top_k, s.hidden, stream);
}

}  // namespace

const CardFacts& card_facts() {
  constexpr int kMostCards = 64;
  static CardFacts known[kMostCards];
  static std::mutex guard;
  int device = 0;
  check(cudaGetDevice(&device), "experts: device");
  if (device >= kMostCards) throw std::runtime_error("experts: more than 64 cards");
  const std::lock_guard<std::mutex> lock(guard);
  CardFacts& facts = known[device];
  if (facts.multiprocessors == 0) {
    auto attribute = [&](cudaDeviceAttr which) {
      int value = 0;
      check(cudaDeviceGetAttribute(&value, which, device), "experts: device");
      return value;
    };
    facts.major = attribute(cudaDevAttrComputeCapabilityMajor);
    if (!has_hopper_code()) facts.major = std::min(facts.major, 8);
    facts.shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    facts.multiprocessors = attribute(cudaDevAttrMultiProcessorCount);
  }
  return facts;
}

int64_t experts_state_bytes(const CardFacts& card) {
  return 2 * kAlign + int64_t{2} * card.multiprocessors * kStreamWarps * sizeof(unsigned);
}

int64_t experts_memory_bytes(const ExpertsPlan& plan, const ExpertsShape& shape,
                             const CardFacts& card) {
  if (plan.path != ExpertsPath::kStream) return SortedMemory(nullptr, plan, shape).bytes;
  int64_t bytes = 0;
  stream_state(nullptr, nullptr, shape, card, &bytes);
  return bytes;
}

void run_experts(const ExpertsPlan& plan, const ExpertsCall& call, const ExpertsScratch& scratch,
                 const CardFacts& card, cudaStream_t stream) {
  if (call.tokens == 0) return;
  if (plan.path != ExpertsPath::kStream) {
    return run_sorted(plan, call, scratch.memory, card, stream);
  }
  StreamJob job{};
  int64_t bytes = 0;
  job.call = call;
  job.state = stream_state(scratch.memory, scratch.state, shape_of(call), card, &bytes);
  job.stages = plan.stages;
  job.copy_chunks = plan.copy_chunks;
  job.row_bytes = plan.row_bytes;
  launch_stream(job, card.multiprocessors, stream);
}

}  // namespace fd::cuda

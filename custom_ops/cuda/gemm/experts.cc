// The experts of a MoE layer: memory and launches.
#include "experts.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <stdexcept>

#include "../ops.h"
#include "../pieces.h"
#include "jobs.cuh"
#include "stream.h"

namespace fd::cuda {
namespace {

int padded(int k) { return ceil_div(k, kChunkK) * kChunkK; }

struct SortedMemory {
  SortedSlots sorted;
  __half* x;
  float* x_scale;
  __nv_bfloat16* inner_bf16;
  __half* inner;
  float* inner_scale;
  __nv_bfloat16* outputs;  // [slots][H]; in the memory of x, which is read no more by then
  int64_t bytes;

  SortedMemory(void* memory, const ExpertsPlan& plan, const ExpertsShape& s) {
    const int64_t slots = int64_t{s.tokens} * s.top_k;
    const int64_t x_rows = plan.path == ExpertsPath::kTiles ? slots : s.tokens;
    Pieces pieces(memory);
    sorted.slot_of_row = pieces.take<int>(slots);
    sorted.token_of_row = pieces.take<int>(slots);
    sorted.tile_of_row = pieces.take<int2>(slots);
    sorted.tiles = pieces.take<int4>(plan.max_tiles);
    sorted.counts = pieces.take<int>(kSortCounts);
    x_scale = pieces.take<float>(x_rows);
    inner_scale = pieces.take<float>(slots);
    inner_bf16 = pieces.take<__nv_bfloat16>(slots * s.inner);
    inner = pieces.take<__half>(slots * padded(s.inner));
    x = pieces.take<__half>(std::max(x_rows * padded(s.hidden), slots * s.hidden));
    outputs = reinterpret_cast<__nv_bfloat16*>(x);
    bytes = pieces.used();
  }
};

struct StreamBytes {
  int64_t memory, state;
};

StreamState stream_state(void* memory, void* state, const ExpertsShape& s, const CardFacts& card,
                         StreamBytes* bytes) {
  const int64_t slots = int64_t{s.tokens} * s.top_k;
  Pieces kept(state), pieces(memory);
  StreamState result{};
  result.passed = kept.take<unsigned>(1);
  result.ready = kept.take<unsigned>(kStreamSlots);
  result.columns = kept.take<unsigned>(kStreamBlocks);
  result.sums =
      kept.take<uint4>(int64_t{2} * card.multiprocessors * kStreamWarps * kStreamHanded * kWarp);
  result.inner = pieces.take<__nv_bfloat16>(slots * s.inner);
  result.outputs = pieces.take<__nv_bfloat16>(slots * s.hidden);
  *bytes = {pieces.used(), kept.used()};
  return result;
}

ExpertsShape shape_of(const ExpertsCall& call) {
  ExpertsShape shape = experts_shape(call.up_gate, call.down);
  shape.tokens = call.tokens;
  shape.top_k = call.top_k;
  return shape;
}

void run_sorted(const ExpertsPlan& plan, const ExpertsCall& call, void* memory,
                const CardFacts& card, cudaStream_t stream) {
  const ExpertsShape s = shape_of(call);
  const SortedMemory m(memory, plan, s);
  const int slots = s.tokens * s.top_k;
  const bool hopper = plan.path == ExpertsPath::kTiles;
  const RowOrder order = hopper ? RowOrder::kSlots : RowOrder::kEights;
  auto multiply = [&](const TilesJob& job) {
    if (hopper) return tiles_hopper(job, plan.tile_tokens, card.multiprocessors, stream);
    tiles_plain(job, plan.max_tiles, stream);
  };
  const SortedSlots& sorted = m.sorted;
  sort_slots(call.ids, slots, s.top_k, s.experts, plan.tile_tokens, sorted, stream);
  // Hopper's tiles take rows in their own order, so those of a token once for each of its experts
  const int2* tile_of_row = hopper ? sorted.tile_of_row : nullptr;
  convert_rows({call.x, hopper ? slots : s.tokens, s.hidden, padded(s.hidden),
                hopper ? sorted.token_of_row : nullptr, tile_of_row, m.x, m.x_scale},
               order, stream);
  multiply({call.up_gate, m.x, m.x_scale, sorted.slot_of_row, sorted.tiles, sorted.counts,
            sorted.counts + 2, hopper ? nullptr : sorted.token_of_row, true, m.inner_bf16,
            warp_arrivals()});
  convert_rows(
      {m.inner_bf16, slots, s.inner, padded(s.inner), nullptr, tile_of_row, m.inner, m.inner_scale},
      order, stream);
  multiply({call.down, m.inner, m.inner_scale, sorted.slot_of_row, sorted.tiles, sorted.counts,
            sorted.counts + 4, nullptr, false, m.outputs, warp_arrivals()});
  combine(m.outputs, call.route_weights, call.out, s.tokens, s.top_k, s.hidden, stream);
}

}  // namespace

ExpertsShape experts_shape(const ExpertWeight& up_gate, const ExpertWeight& down) {
  const bool alike = up_gate.coding == down.coding;
  ExpertsShape shape{};
  shape.experts = up_gate.experts;
  shape.hidden = up_gate.in_features;
  shape.inner = down.in_features;
  shape.chunk_bytes = alike ? chunk_bytes(up_gate.coding) : 0;
  shape.ccq = alike && up_gate.coding == Coding::kCcq;
  return shape;
}

int warp_arrivals() {
  const char* const set = std::getenv("FD_LITE_RACECHECK");
  // Blanks may stand around it; envs.py refuses all but 0 and 1.
  return set != nullptr && std::strchr(set, '1') != nullptr ? kWarp : 1;
}

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
  StreamBytes bytes{};
  stream_state(nullptr, nullptr, {}, card, &bytes);
  return bytes.state;
}

int64_t experts_memory_bytes(const ExpertsPlan& plan, const ExpertsShape& shape,
                             const CardFacts& card) {
  if (!streams(plan.path)) return SortedMemory(nullptr, plan, shape).bytes;
  StreamBytes bytes{};
  stream_state(nullptr, nullptr, shape, card, &bytes);
  return bytes.memory;
}

void run_experts(const ExpertsPlan& plan, const ExpertsCall& call, const ExpertsScratch& scratch,
                 const CardFacts& card, cudaStream_t stream) {
  if (call.tokens == 0) return;
  if (!streams(plan.path)) {
    return run_sorted(plan, call, scratch.memory, card, stream);
  }
  StreamJob job{};
  StreamBytes bytes{};
  job.call = call;
  job.state = stream_state(scratch.memory, scratch.state, shape_of(call), card, &bytes);
  job.room_bytes = plan.room_bytes;
  job.digits = plan.path == ExpertsPath::kDigits;
  launch_stream(job, card.multiprocessors, stream);
}

}  // namespace fd::cuda

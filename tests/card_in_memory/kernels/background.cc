// What happens beside the threads: copies, products of wgmma, stores on their way to other blocks.
#include <algorithm>
#include <cstring>

#include "machine.h"
#include "products.h"
#include "schedule.h"

namespace card {
namespace {

constexpr uint64_t kMark = 0x7068617365000000;  // an mbarrier in shared memory: this and its number
constexpr uint64_t kMarkBits = 0xffffffffff000000;

template <typename T>
void erase(std::vector<T>& list, size_t at) {
  list[at] = std::move(list.back());
  list.pop_back();
}

template <typename T>
void erase_value(std::vector<T>& list, const T& value) {
  const auto found = std::find(list.begin(), list.end(), value);
  if (found != list.end()) erase(list, found - list.begin());
}

// -- mbarriers ------------------------------------------------------------------------------------

size_t phase_number(uint32_t address) {
  uint64_t word;
  if (address % 8 != 0) fail("an mbarrier is not at a multiple of 8");
  std::memcpy(&word, shared_at(address, 8), 8);
  const size_t number = word & ~kMarkBits;
  const std::vector<PhaseBarrier>& all = self->block->phases;
  if ((word & kMarkBits) != kMark || number >= all.size() || all[number].address != address) {
    fail("shared memory at " + std::to_string(address) + " holds no mbarrier, or none any more");
  }
  return number;
}

void end_phase_if_complete(PhaseBarrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  barrier.pending = barrier.expected;
  ++barrier.phase;
  ++machine.progress;
  for (Thread* thread : barrier.waiting) wake(*thread);
  barrier.waiting.clear();
}

// -- bulk copies ----------------------------------------------------------------------------------

void make(const BulkCopy& copy) {
  std::memcpy(copy.to, copy.from, copy.bytes);
  --copy.block->copies_under_way;
  PhaseBarrier& barrier = copy.block->phases[copy.phase_barrier];
  barrier.bytes -= copy.bytes;
  end_phase_if_complete(barrier);
}

// -- cp.async -------------------------------------------------------------------------------------

void make(const SmallCopy& copy) {
  if (copy.from == nullptr) {
    std::memset(copy.to, 0, 16);
  } else {
    std::memcpy(copy.to, copy.from, 16);
  }
}

void make_one(Thread& thread) {
  const size_t at = machine.random.below(thread.copies.size());
  make(thread.copies[at]);
  erase(thread.copies, at);
  if (thread.copies.empty()) erase_value(machine.copying, &thread);
}

// -- products -------------------------------------------------------------------------------------

int floats_of(const Product& product) { return product.columns / 2; }  // of a lane

/// Does the oldest product; its sums go back to their registers with the last one that adds to
/// them.
void multiply_next(Warp& warp) {
  const Product product = warp.products.front();
  warp.products.erase(warp.products.begin());
  if (warp.products.empty()) erase_value(machine.multiplying, &warp);
  std::vector<float>& sums = warp.sums_of(product.sums[0]);
  multiply(product, warp.block->shared, sums.data());
  for (const Product& later : warp.products) {
    if (later.sums[0] == product.sums[0]) return;
  }
  const int each = floats_of(product);
  for (int lane = 0; lane < kLanes; ++lane) {
    std::memcpy(product.sums[lane], &sums[lane * each], each * sizeof(float));
  }
  warp.forget_sums(product.sums[0]);
}

// -- stores ---------------------------------------------------------------------------------------

/// Whether what `thread` does now comes after the store.
bool comes_after(const Thread& thread, const LateStore& store) {
  if (store.by == &thread) return true;
  if (store.by->block != thread.block) return false;
  if (store.block_syncs < thread.block->syncs) return true;
  return store.by->warp == thread.warp && store.warp_syncs < thread.warp->syncs;
}

template <typename Condition>
void make_visible_if(Block& block, Condition condition) {
  size_t kept = 0;
  for (const LateStore& store : block.stores) {
    if (condition(store)) {
      make_visible(store);
    } else {
      block.stores[kept++] = store;
    }
  }
  block.stores.resize(kept);
}

bool store_one(std::vector<LateStore>& stores) {
  if (stores.empty()) return false;
  const size_t at = machine.random.below(stores.size());
  make_visible(stores[at]);
  erase(stores, at);
  signal();
  return true;
}

bool store_any() {
  const size_t count = machine.seats.size(), from = machine.random.below(count + 1);
  for (size_t i = 0; i <= count; ++i) {
    const size_t at = (from + i) % (count + 1);
    if (store_one(at == count ? machine.orphans : machine.seats[at]->block.stores)) return true;
  }
  return false;
}

bool copy_any() {
  if (machine.bulk.empty()) return false;
  const size_t at = machine.random.below(machine.bulk.size());
  const BulkCopy copy = machine.bulk[at];
  erase(machine.bulk, at);
  make(copy);
  return true;
}

bool small_copy_any() {
  if (machine.copying.empty()) return false;
  make_one(*machine.copying[machine.random.below(machine.copying.size())]);
  return true;
}

bool multiply_any() {
  if (machine.multiplying.empty()) return false;
  multiply_next(*machine.multiplying[machine.random.below(machine.multiplying.size())]);
  return true;
}

}  // namespace

std::vector<float>& Warp::sums_of(const float* registers) {
  for (auto& [known, sums] : kept_sums) {
    if (known == registers) return sums;
  }
  kept_sums.emplace_back(registers, std::vector<float>());
  return kept_sums.back().second;
}

void Warp::forget_sums(const float* registers) {
  const auto found = std::find_if(kept_sums.begin(), kept_sums.end(),
                                  [&](const auto& kept) { return kept.first == registers; });
  erase(kept_sums, found - kept_sums.begin());
}

bool act() {
  bool (*const kinds[])() = {copy_any, small_copy_any, multiply_any, store_any};
  const uint32_t from = machine.random.below(4);
  for (uint32_t i = 0; i < 4; ++i) {
    if (kinds[(from + i) % 4]()) {
      ++machine.progress;
      return true;
    }
  }
  return false;
}

void finish_block(Block& block) {
  for (const Warp& warp : block.warps) {
    if (!warp.products.empty()) fail("a warp ended before its products");
    if (warp.products_begun != block.warps[warp.number / 4 * 4].products_begun) {
      fail("a warpgroup's warps began different products");
    }
  }
  if (block.copies_under_way != 0) fail("a block ended before its bulk copies");
  for (Thread& thread : block.threads) {
    if (!thread.copies.empty()) fail("a thread ended before its copies");
  }
  for (const LateStore& store : block.stores) machine.orphans.push_back(store);
}

void forget_background() {
  machine.bulk.clear();
  machine.copying.clear();
  machine.multiplying.clear();
  machine.orphans.clear();
}

// -- from kernels ---------------------------------------------------------------------------------

void init_phases(uint32_t barrier, int arrivals) {
  std::vector<PhaseBarrier>& all = self->block->phases;
  const uint64_t word = kMark | all.size();
  std::memcpy(shared_at(barrier, 8), &word, 8);
  all.push_back({barrier, arrivals, arrivals, 0, 0, {}});
}

void arrive(uint32_t barrier, int64_t bytes) {
  maybe_give_way();
  PhaseBarrier& found = self->block->phases[phase_number(barrier)];
  if (found.pending == 0) fail("more arrivals at an mbarrier than it expects");
  --found.pending;
  found.bytes += bytes;
  end_phase_if_complete(found);
}

void wait_phase(uint32_t barrier, uint32_t parity) {
  if (parity > 1) fail("a parity that is neither 0 nor 1");
  const size_t number = phase_number(barrier);
  while (self->block->phases[number].phase % 2 == parity) {
    self->block->phases[number].waiting.push_back(self);
    self->warp->runnable &= ~(1u << self->lane);
    leave("an mbarrier");
  }
}

void copy_bulk(uint32_t to, const void* from, int64_t bytes, uint32_t barrier) {
  if (to % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0 || bytes % 16 != 0 ||
      bytes <= 0) {
    fail("a bulk copy of " + std::to_string(bytes) + " bytes to " + std::to_string(to) +
         ": not in sixteens");
  }
  const BulkCopy copy{self->block, shared_at(to, bytes), from, bytes, phase_number(barrier)};
  ++self->block->copies_under_way;
  if (machine.mood.copies_at_once) return make(copy);
  std::memset(copy.to, 0xff, bytes);
  machine.bulk.push_back(copy);
}

void copy_small(void* to, const void* from) {
  shared_at(shared_offset(to), 16);
  Thread& thread = *self;
  const SmallCopy copy{to, from, thread.copy_group};
  if (machine.mood.copies_at_once) return make(copy);
  std::memset(to, 0xff, 16);
  if (thread.copies.empty()) machine.copying.push_back(&thread);
  thread.copies.push_back(copy);
}

void commit_copies() { ++self->copy_group; }

void wait_copies(int pending) {
  Thread& thread = *self;
  size_t kept = 0;
  for (const SmallCopy& copy : thread.copies) {
    if (copy.group < thread.copy_group - pending) {
      make(copy);
    } else {
      thread.copies[kept++] = copy;
    }
  }
  thread.copies.resize(kept);
  if (kept == 0) erase_value(machine.copying, &thread);
}

void begin_product(Warp& warp, const Product& product) {
  if (!warp.fenced) fail("a product without wgmma.fence before it");
  ++warp.products_begun;
  const int each = floats_of(product);
  bool alone = true;
  for (const Product& earlier : warp.products) alone = alone && earlier.sums[0] != product.sums[0];
  if (alone) {
    std::vector<float>& sums = warp.sums_of(product.sums[0]);
    sums.resize(kLanes * each);
    for (int lane = 0; lane < kLanes; ++lane) {
      std::memcpy(&sums[lane * each], product.sums[lane], each * sizeof(float));
      std::memset(product.sums[lane], 0xff, each * sizeof(float));
    }
  }
  if (warp.products.empty()) machine.multiplying.push_back(&warp);
  warp.products.push_back(product);
  if (machine.mood.copies_at_once) multiply_next(warp);
}

void wait_products(Warp& warp, int pending) {
  while (!warp.products.empty() && warp.products.front().group < warp.product_group - pending) {
    multiply_next(warp);
  }
}

void make_visible(const LateStore& store) { std::memcpy(store.to, store.bytes, store.size); }

void store_late(void* to, const void* value, int size) {
  maybe_give_way();
  if (machine.mood.copies_at_once) {
    std::memcpy(to, value, size);
    return;
  }
  const Thread& thread = *self;
  LateStore store{static_cast<uint8_t*>(to), {}, size, &thread, thread.warp->syncs,
                  thread.block->syncs};
  std::memcpy(store.bytes, value, size);
  self->block->stores.push_back(store);
}

void load_late(const void* from, void* value, int size) {
  maybe_give_way();
  const auto* const first = static_cast<const uint8_t*>(from);
  make_visible_if(*self->block, [&](const LateStore& store) {
    return store.to < first + size && first < store.to + store.size && comes_after(*self, store);
  });
  std::memcpy(value, from, size);
}

void release() {
  make_visible_if(*self->block, [](const LateStore& store) { return comes_after(*self, store); });
}

}  // namespace card

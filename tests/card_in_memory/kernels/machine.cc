#include "machine.h"

#include <algorithm>
#include <map>
#include <stdexcept>

#include "cuda_runtime.h"
#include "schedule.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace card {

Thread* self = nullptr;
Machine machine;

namespace {

constexpr uint32_t kFirstByte = 1024;  // of shared memory: the first KB is the card's own
constexpr uint32_t kMostShared = 227 * 1024;
constexpr uint32_t kGap = 1024;  // room to put dynamic memory where it is least aligned
constexpr uint32_t kSharedBytes = kFirstByte + kGap + kMostShared;
constexpr int kIdleRounds = 64;  // pollers look so many times at what does not change

Mood draw_mood(Random& random) {
  constexpr int kTurns[] = {1, 4, 16, 64}, kResident[] = {1, 2, 4, 8};
  constexpr uint32_t kOdds[] = {0, 0, 1, 4, 32};
  Mood mood;
  mood.calm = false;
  mood.lane_order = random.below(3);
  mood.turn = kTurns[random.below(4)];
  mood.ranked = random.one_in(3);
  mood.copies_at_once = random.one_in(6);
  mood.copy_odds = kOdds[random.below(5)];
  mood.resident = kResident[random.below(4)];
  mood.block_order = random.below(3);
  return mood;
}

void become(Thread& thread) {
  self = &thread;
  threadIdx = thread.index;
}

uint32_t bit_of(const Thread& thread) { return 1u << thread.lane; }

/// A set bit of `lanes`, the one whose turn it is after `lane`.
int next_lane(uint32_t lanes, int lane) {
  const uint64_t twice = uint64_t{lanes} << 32 | lanes;
  switch (machine.mood.lane_order) {
    case 0:
      return (__builtin_ctzll(twice >> (lane + 1)) + lane + 1) % kLanes;
    case 1:
      return (63 - __builtin_clzll(twice << (kLanes - lane)) + lane) % kLanes;
    default: {
      const int from = machine.random.below(kLanes);
      return (__builtin_ctzll(twice >> from) + from) % kLanes;
    }
  }
}

void hold_meeting(Warp& warp) {
  warp.present = warp.arrived;
  warp.arrived = 0;
  if (warp.meeting == Meeting::kSync) ++warp.syncs;
  warp.meeting = Meeting::kNone;
  if (warp.work != nullptr) warp.work(warp);
  warp.runnable |= warp.present;
  ++machine.progress;
  --machine.meetings_left;
}

void open(Block& block, NamedBarrier& barrier) {
  barrier.result = barrier.all;
  barrier.all = true;
  barrier.arrived = 0;
  if (&barrier == &block.barriers[0]) ++block.syncs;
  for (Thread* thread : barrier.waiting) wake(*thread);
  barrier.waiting.clear();
  ++machine.progress;
}

/// Where every thread begins.
void enter() {
  machine.grid.kernel();
  Warp& warp = *self->warp;
  Block& block = *self->block;
  warp.live &= ~bit_of(*self);
  warp.runnable &= ~bit_of(*self);
  --block.live;
  ++machine.progress;
  if (warp.arrived != 0 && warp.arrived == warp.live) hold_meeting(warp);
  NamedBarrier& all = block.barriers[0];
  if (all.arrived > 0 && all.arrived == block.live) open(block, all);
  leave("nothing");
}

// -- blocks ---------------------------------------------------------------------------------------

void begin_thread(Seat& seat, int number) {
  Block& block = seat.block;
  const dim3 size = block.grid->threads;
  Thread& thread = block.threads[number];
  const unsigned at = number;
  thread.index = {at % size.x, at / size.x % size.y, at / size.x / size.y};
  thread.block = &block;
  thread.warp = &block.warps[number / kLanes];
  thread.lane = number % kLanes;
  thread.polled = nullptr;
  thread.copies.clear();
  thread.copy_group = 0;
  thread.context = seat.stacks[number]->begin(enter);
  thread.warp->live |= bit_of(thread);
  wake(thread);
}

void begin_block(uint32_t number) {
  if (machine.free_seats.empty()) {
    machine.free_seats.push_back(std::make_unique<Seat>());
    machine.free_seats.back()->shared.reset(new uint8_t[kSharedBytes + 4096]);
  }
  machine.seats.push_back(std::move(machine.free_seats.back()));
  machine.free_seats.pop_back();
  Seat& seat = *machine.seats.back();
  Grid& grid = machine.grid;
  const int threads = grid.threads.x * grid.threads.y * grid.threads.z;
  while (static_cast<int>(seat.stacks.size()) < threads) {
    seat.stacks.push_back(std::make_unique<Stack>());
  }
  Block& block = seat.block;
  std::vector<Thread> old = std::move(block.threads);
  block = Block{};
  block.threads = std::move(old);
  if (static_cast<int>(block.threads.size()) < threads) block.threads.resize(threads);
  block.grid = &grid;
  block.index = {number % grid.blocks.x, number / grid.blocks.x % grid.blocks.y,
                 number / grid.blocks.x / grid.blocks.y};
  block.warps.resize((threads + kLanes - 1) / kLanes);
  block.live = threads;
  const auto start = reinterpret_cast<uintptr_t>(seat.shared.get());
  block.shared = reinterpret_cast<uint8_t*>((start + 4095) / 4096 * 4096);
  block.shared_used = kFirstByte;
  if (grid.shared_bytes > 0) {
    block.dynamic_at = kFirstByte;
    block.shared_used += kGap + static_cast<uint32_t>(grid.shared_bytes);
    std::memset(block.shared + kFirstByte, 0xff, block.shared_used - kFirstByte);
  }
  for (size_t i = 0; i < block.warps.size(); ++i) {
    Warp& warp = block.warps[i];
    warp.block = &block;
    warp.threads = &block.threads[i * kLanes];
    warp.number = static_cast<int>(i);
    warp.rank = static_cast<uint32_t>(machine.random.next());
  }
  for (int i = 0; i < threads; ++i) begin_thread(seat, i);
}

void begin_blocks() {
  const size_t most = machine.grid.together ? ~size_t{0} : machine.mood.resident;
  while (!machine.waiting_blocks.empty() && machine.seats.size() < most) {
    const uint32_t next = machine.waiting_blocks.back();
    machine.waiting_blocks.pop_back();
    begin_block(next);
  }
}

void end_blocks() {
  for (size_t i = machine.seats.size(); i-- > 0;) {
    if (machine.seats[i]->block.live > 0) continue;
    finish_block(machine.seats[i]->block);
    machine.free_seats.push_back(std::move(machine.seats[i]));
    machine.seats.erase(machine.seats.begin() + static_cast<int64_t>(i));
  }
}

void line_up_blocks() {
  const dim3 size = machine.grid.blocks;
  const uint32_t count = size.x * size.y * size.z;
  std::vector<uint32_t>& blocks = machine.waiting_blocks;
  blocks.clear();
  for (uint32_t i = 0; i < count; ++i) blocks.push_back(count - 1 - i);
  if (machine.mood.block_order == 1) std::reverse(blocks.begin(), blocks.end());
  if (machine.mood.block_order == 2) {
    for (uint32_t i = count; i > 1; --i) std::swap(blocks[i - 1], blocks[machine.random.below(i)]);
  }
}

// -- turns ----------------------------------------------------------------------------------------

void remove_ready(Warp& warp) {
  machine.ready.back()->ready_at = warp.ready_at;
  machine.ready[warp.ready_at] = machine.ready.back();
  machine.ready.pop_back();
  warp.ready_at = -1;
}

Warp& choose() {
  std::vector<Warp*>& ready = machine.ready;
  if (machine.mood.calm) return *ready.back();
  if (!machine.mood.ranked) return *ready[machine.random.below(ready.size())];
  Warp& first = **std::max_element(ready.begin(), ready.end(),
                                   [](const Warp* a, const Warp* b) { return a->rank < b->rank; });
  if (machine.random.one_in(32)) first.rank = static_cast<uint32_t>(machine.random.next() >> 8);
  return first;
}

void take_turn(Warp& warp) {
  machine.meetings_left = machine.mood.calm ? 1 << 30 : 1 + machine.random.below(machine.mood.turn);
  become(warp.threads[next_lane(warp.runnable, kLanes - 1)]);
  blockIdx = warp.block->index;
  change(machine.host, self->context);
  self = nullptr;
  if (warp.runnable == 0) remove_ready(warp);
}

/// Who waits for what.
std::string waiting() {
  std::map<std::string, int> counts;
  for (const auto& seat : machine.seats) {
    const Block& block = seat->block;
    for (const Warp& warp : block.warps) {
      for (int lane = 0; lane < kLanes; ++lane) {
        if ((warp.live >> lane & 1) == 0) continue;
        const char* what = warp.threads[lane].waits_for;
        ++counts["block " + std::to_string(block.index.x) + " warp " + std::to_string(warp.number) +
                 " for " + (what == nullptr ? "nothing" : what)];
      }
    }
  }
  std::string text;
  for (const auto& [what, count] : counts) text += "\n  " + std::to_string(count) + " of " + what;
  return text;
}

/// Nobody can go on: copies, then stores, then another look at what pollers wait for.
void unstick(int64_t& seen_progress, int& idle_rounds) {
  if (act()) return;
  if (seen_progress != machine.progress) idle_rounds = 0;
  seen_progress = machine.progress;
  if (machine.pollers.empty() || ++idle_rounds > kIdleRounds) {
    fail("all threads wait for ever:" + waiting());
  }
  for (Thread* thread : machine.pollers) wake(*thread);
  machine.pollers.clear();
}

void clear_away() {
  for (auto& seat : machine.seats) machine.free_seats.push_back(std::move(seat));
  machine.seats.clear();
  machine.ready.clear();
  machine.pollers.clear();
  forget_background();
}

void run_blocks() {
  int64_t seen_progress = -1;
  int idle_rounds = 0;
  for (begin_blocks(); !machine.seats.empty(); begin_blocks()) {
    if (machine.ready.empty()) {
      unstick(seen_progress, idle_rounds);
    } else {
      take_turn(choose());
    }
    if (!machine.error.empty()) throw std::runtime_error(machine.error);
    end_blocks();
    if (machine.mood.copy_odds > 0 && machine.random.one_in(machine.mood.copy_odds)) act();
  }
  for (const LateStore& store : machine.orphans) make_visible(store);
  machine.orphans.clear();
}

}  // namespace

void wake(Thread& thread) {
  Warp& warp = *thread.warp;
  warp.runnable |= bit_of(thread);
  if (warp.ready_at >= 0) return;
  warp.ready_at = static_cast<int>(machine.ready.size());
  machine.ready.push_back(&warp);
}

void leave(const char* waits_for) {
  Thread& from = *self;
  Warp& warp = *from.warp;
  from.waits_for = waits_for;
  if (warp.runnable == 0 || machine.meetings_left <= 0) return change(from.context, machine.host);
  Thread& to = warp.threads[next_lane(warp.runnable, from.lane)];
  if (&to == &from) return;
  become(to);
  change(from.context, to.context);
}

void fail(const std::string& what) {
  if (self == nullptr) throw std::runtime_error(what);
  machine.error = "block " + std::to_string(self->block->index.x) + ", thread " +
                  std::to_string(self->index.x) + ": " + what;
  while (true) change(self->context, machine.host);
}

void meet(Meeting meeting, void (*work)(Warp&), void* brought) {
  constexpr const char* kNames[] = {"",      "__syncwarp", "a shuffle", "a vote",
                                    "elect", "a product",  "matrices",  "registers"};
  Thread& thread = *self;
  Warp& warp = *thread.warp;
  if (warp.arrived == 0) {
    warp.meeting = meeting;
    warp.work = work;
  } else if (warp.meeting != meeting || warp.work != work) {
    fail(std::string("lanes of a warp part: some are at ") + kNames[static_cast<int>(meeting)] +
         ", some at " + kNames[static_cast<int>(warp.meeting)]);
  }
  warp.brought[thread.lane] = brought;
  warp.arrived |= bit_of(thread);
  if (warp.arrived == warp.live) {
    hold_meeting(warp);
    if (machine.meetings_left <= 0) leave("nothing");
    return;
  }
  warp.runnable &= ~bit_of(thread);
  leave(kNames[static_cast<int>(meeting)]);
}

bool sync(int number, int count, bool mine) {
  Block& block = *self->block;
  NamedBarrier& barrier = block.barriers[number];
  barrier.all = barrier.all && mine;
  if (++barrier.arrived == (count > 0 ? count : block.live)) {
    open(block, barrier);
  } else {
    barrier.waiting.push_back(self);
    self->warp->runnable &= ~bit_of(*self);
    leave("a barrier of the block");
  }
  return barrier.result;
}

int elected_lane() { return static_cast<int>(machine.launches * 7 % kLanes); }

void maybe_give_way() {
  if (machine.mood.calm || !machine.random.one_in(4)) return;
  if (machine.random.one_in(2)) machine.meetings_left = 0;  // to another warp
  leave("nothing");
}

void poll(const void* from, void* value, int size) {
  maybe_give_way();
  Thread& thread = *self;
  if (thread.polled == from && std::memcmp(thread.seen, from, size) == 0) {
    machine.pollers.push_back(&thread);
    thread.warp->runnable &= ~bit_of(thread);
    leave("a word of global memory");
  }
  thread.polled = from;
  thread.seen_bytes = size;
  std::memcpy(thread.seen, from, size);
  std::memcpy(value, thread.seen, size);
}

void signal() {
  std::vector<Thread*>& pollers = machine.pollers;
  const auto changed = std::partition(pollers.begin(), pollers.end(), [](const Thread* thread) {
    return std::memcmp(thread->seen, thread->polled, thread->seen_bytes) == 0;
  });
  std::for_each(changed, pollers.end(), [](Thread* thread) { wake(*thread); });
  pollers.erase(changed, pollers.end());
  ++machine.progress;
}

void* static_shared(const void* variable, int64_t bytes, int alignment) {
  Block& block = *self->block;
  for (const auto& [known, at] : block.variables) {
    if (known == variable) return block.shared + at;
  }
  const uint32_t at = (block.shared_used + alignment - 1) / alignment * alignment;
  block.shared_used = at + static_cast<uint32_t>(bytes);
  if (block.shared_used > kSharedBytes) fail("more than 227 KB of shared memory");
  std::memset(block.shared + at, 0xff, bytes);
  block.variables.emplace_back(variable, at);
  return block.shared + at;
}

void* dynamic_shared(int alignment) {
  Block& block = *self->block;
  if (block.dynamic_at == 0) fail("the launch names no dynamic shared memory");
  return block.shared + kFirstByte + alignment % kGap;  // no better aligned than it says
}

uint32_t shared_offset(const void* p) {
  const Block& block = *self->block;
  const int64_t at = static_cast<const uint8_t*>(p) - block.shared;
  if (at < kFirstByte || at > block.shared_used) fail("an address is not of shared memory");
  return static_cast<uint32_t>(at);
}

uint8_t* shared_at(uint32_t address, int64_t bytes) {
  Block& block = *self->block;
  if (address < kFirstByte || address + bytes > block.shared_used) {
    fail("bytes " + std::to_string(address) + " to " + std::to_string(address + bytes) +
         " of shared memory, which ends at " + std::to_string(block.shared_used));
  }
  return block.shared + address;
}

void set_seed(uint64_t seed) {
  machine.seed = seed;
  machine.launches = 0;
}

void run(Grid grid) {
  machine.grid = std::move(grid);
  machine.error.clear();
  const uint64_t launch = machine.launches++;
  machine.random = Random(machine.seed * 1000003 + launch);
  machine.mood = machine.seed == 0 ? Mood{} : draw_mood(machine.random);
  if (machine.grid.shared_bytes > kMostShared) fail("more than 227 KB of shared memory");
  blockDim = machine.grid.threads;
  gridDim = machine.grid.blocks;
  line_up_blocks();
  try {
    run_blocks();
  } catch (...) {
    self = nullptr;
    clear_away();
    throw;
  }
}

}  // namespace card

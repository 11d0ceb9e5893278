// A card in main memory: blocks of CUDA threads as fibers of one host thread.
//
// Several blocks are alive at once. Who goes on next, and when a copy that runs in the background
// is made, a seed decides; without one everything happens in order and at once. What the rules of
// CUDA leave open is used against the kernels: shared memory begins as garbage, a copy's target is
// garbage from its start to its end, copies and stores come as late as waits and fences allow.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <unordered_map>
#include <vector>

#include "context.h"

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace card {

constexpr int kLanes = 32;
constexpr int kNamedBarriers = 16;

struct Block;
struct Grid;
struct Warp;

/// What all lanes of a warp do together; they must mean the same.
enum class Meeting : int { kNone, kSync, kShuffle, kVote, kElect, kProduct, kMatrices, kRegisters };

/// A product of wgmma for a warp's 16 rows; see products.h.
struct Product {
  int columns;
  bool bf16, onto;
  uint64_t matrix;
  float* sums[kLanes];
  const uint32_t* a[kLanes];
  int group;
};

/// A copy of 16 bytes by cp.async.
struct SmallCopy {
  void* to;
  const void* from;  // null: zeros
  int group;
};

/// A store that other blocks need not see before a release.
struct LateStore {
  uint8_t* to;
  uint8_t bytes[16];
  int size;
  const struct Thread* by;
  int64_t warp_syncs, block_syncs;  // so far when it was made
};

struct Thread {
  Context context;
  dim3 index;
  Block* block = nullptr;
  Warp* warp = nullptr;
  int lane = 0;
  const char* waits_for = nullptr;
  const void* polled = nullptr;  // the last word that it looked at, and what it saw
  uint32_t seen[4];
  int seen_bytes = 0;
  std::vector<SmallCopy> copies;
  int copy_group = 0;
};

struct Warp {
  Block* block = nullptr;
  Thread* threads = nullptr;
  int number = 0;  // in its block
  uint32_t live = 0, runnable = 0;
  int ready_at = -1;  // in the machine's list
  uint32_t rank = 0;
  Meeting meeting = Meeting::kNone;
  uint32_t arrived = 0, present = 0;  // so far; of the meeting that is held
  void (*work)(Warp&) = nullptr;
  void* brought[kLanes];
  int64_t syncs = 0;
  std::vector<Product> products;                                       // under way
  std::vector<std::pair<const float*, std::vector<float>>> kept_sums;  // that they add to
  int product_group = 0;
  int64_t products_begun = 0;
  bool fenced = false;

  std::vector<float>& sums_of(const float* registers);
  void forget_sums(const float* registers);
};

/// bar.sync and its like.
struct NamedBarrier {
  int arrived = 0;
  bool all = true;
  std::vector<Thread*> waiting;
  bool result = true;
};

/// An mbarrier; shared memory holds its number.
struct PhaseBarrier {
  uint32_t address;
  int expected, pending;
  int64_t bytes = 0;  // that copies still have to bring
  uint64_t phase = 0;
  std::vector<Thread*> waiting;
};

struct Block {
  Grid* grid = nullptr;
  dim3 index;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  int live = 0;
  uint8_t* shared = nullptr;  // kSharedBytes
  uint32_t shared_used = 0, dynamic_at = 0;
  std::vector<std::pair<const void*, uint32_t>> variables;
  NamedBarrier barriers[kNamedBarriers];
  int64_t syncs = 0;
  std::vector<PhaseBarrier> phases;
  std::vector<LateStore> stores;
  int copies_under_way = 0;
};

struct Grid {
  dim3 blocks, threads;
  int64_t shared_bytes = 0;
  bool together = false;  // all blocks at once
  std::function<void()> kernel;
};

/// The thread that runs.
extern Thread* self;

// -- from kernels ---------------------------------------------------------------------------------

/// Says what is wrong and ends the launch, which throws it.
[[noreturn]] void fail(const std::string& what);

/// Waits for the other lanes; the last one does `work`, with what each of them brought.
void meet(Meeting meeting, void (*work)(Warp&), void* brought);
/// Waits for `count` threads of the block, 0: for all. Whether all of them said so.
bool sync(int barrier, int count, bool mine);
/// The lane that elect.sync names, in all of a launch.
int elected_lane();
/// A moment at which others may go on.
void maybe_give_way();
/// Looks at `size` bytes that another block may write; whoever looks twice and sees the same waits
/// until they change.
void poll(const void* from, void* value, int size);
/// Something happened: whoever polls a word that it changed may look again.
void signal();

void* static_shared(const void* variable, int64_t bytes, int alignment);
void* dynamic_shared(int alignment);
uint32_t shared_offset(const void* p);
/// `bytes` of the block's shared memory.
uint8_t* shared_at(uint32_t address, int64_t bytes);

void init_phases(uint32_t barrier, int arrivals);
void arrive(uint32_t barrier, int64_t bytes);
void wait_phase(uint32_t barrier, uint32_t parity);

void copy_bulk(uint32_t to, const void* from, int64_t bytes, uint32_t barrier);
void copy_small(void* to, const void* from);
void commit_copies();
void wait_copies(int pending);

void begin_product(Warp& warp, const Product& product);
void wait_products(Warp& warp, int pending);

void store_late(void* to, const void* value, int size);
void load_late(const void* from, void* value, int size);
/// Makes what this thread has stored, and what it has seen stored, visible to all.
void release();

// -- from the host --------------------------------------------------------------------------------

/// 0: in order. Holds for launches from now on.
void set_seed(uint64_t seed);
/// Runs all blocks. Throws std::runtime_error: the kernel broke a rule, or waits for ever.
void run(Grid grid);

}  // namespace card

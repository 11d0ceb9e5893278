// Runs blocks of CUDA threads as fibers: one that waits at a barrier gives way to the next.
#include <cuda_runtime.h>
#include <ucontext.h>

#include <memory>
#include <vector>

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace fibers {
namespace {

constexpr size_t kStackBytes = 128 << 10;
constexpr int kWarp = 32;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  bool done = false;
};

/// Counts who is still there: a thread that has returned keeps nobody waiting.
struct Barrier {
  int members = 0, waiting = 0;
  int64_t round = 0;
  void open_if_complete() {
    if (members == 0 || waiting < members) return;
    waiting = 0;
    ++round;
  }
};

std::vector<Fiber> fibers;
std::vector<Barrier> warps;
std::vector<uint64_t> slots;
Barrier block;
ucontext_t scheduler;
int current = 0;
const std::function<void()>* body = nullptr;

void give_way() { swapcontext(&fibers[current].context, &scheduler); }

void wait(Barrier& barrier) {
  const int64_t round = barrier.round;
  ++barrier.waiting;
  barrier.open_if_complete();
  while (barrier.round == round) give_way();
}

void enter() {
  (*body)();
  fibers[current].done = true;
  for (Barrier* barrier : {&warps[current / kWarp], &block}) {
    --barrier->members;
    barrier->open_if_complete();
  }
  give_way();
}

void run_block(int threads) {
  block = Barrier{threads};
  warps.assign((threads + kWarp - 1) / kWarp, Barrier{});
  for (int i = 0; i < threads; ++i) {
    ++warps[i / kWarp].members;
    Fiber& fiber = fibers[i];
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
  }
  for (int left = threads; left > 0;) {
    for (int i = 0; i < threads; ++i) {
      if (fibers[i].done) continue;
      current = i;
      threadIdx = dim3(i);
      swapcontext(&scheduler, &fibers[i].context);
      left -= fibers[i].done ? 1 : 0;
    }
  }
}

}  // namespace

void wait_for_block() { wait(block); }
void wait_for_warp() { wait(warps[current / kWarp]); }
int lane() { return current % kWarp; }
uint64_t* warp_slots() { return &slots[current / kWarp * kWarp]; }

void run(dim3 grid, int threads, const std::function<void()>& kernel) {
  body = &kernel;
  blockDim = dim3(threads);
  gridDim = grid;
  if (fibers.size() < static_cast<size_t>(threads)) fibers = std::vector<Fiber>(threads);
  slots.resize((threads + kWarp - 1) / kWarp * kWarp);
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = dim3(x, y, z);
        run_block(threads);
      }
    }
  }
}

}  // namespace fibers

// State of the machine that only its own files touch.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "machine.h"
#include "random.h"

namespace card {

/// How a launch is scheduled.
struct Mood {
  bool calm = true;     // in order, nothing in the background
  int lane_order = 0;   // up, down, any
  int turn = 1 << 30;   // meetings of a warp until it is another's turn, at most
  bool ranked = false;  // whoever has the highest rank goes on, else anyone
  bool copies_at_once = true;
  uint32_t copy_odds = 0;  // once in so many turns something in the background happens; 0: when
                           // nobody can go on
  int resident = 1;        // blocks
  int block_order = 0;     // up, down, any
};

struct BulkCopy {
  Block* block;
  uint8_t* to;
  const void* from;
  int64_t bytes;
  size_t phase_barrier;
};

/// A block's memory, used again by later ones.
struct Seat {
  Block block;
  std::vector<std::unique_ptr<Stack>> stacks;
  std::unique_ptr<uint8_t[]> shared;
};

struct Machine {
  uint64_t seed = 0, launches = 0;
  Random random{0};
  Mood mood;
  Grid grid;
  Context host;
  std::string error;
  std::vector<std::unique_ptr<Seat>> free_seats;
  std::vector<std::unique_ptr<Seat>> seats;  // of live blocks
  std::vector<uint32_t> waiting_blocks;      // not begun; the next one last
  std::vector<Warp*> ready;
  std::vector<Thread*> pollers;
  int meetings_left = 0;  // of this turn
  int64_t progress = 0;   // anything that could let somebody go on

  std::vector<BulkCopy> bulk;
  std::vector<Thread*> copying;
  std::vector<Warp*> multiplying;
  std::vector<LateStore> orphans;  // stores of blocks that have ended
};

extern Machine machine;

void wake(Thread& thread);
/// The running thread cannot go on: others do, until it is woken.
void leave(const char* waits_for);
/// Lets something in the background happen; false: there is nothing.
bool act();
void make_visible(const LateStore& store);
void finish_block(Block& block);  // what it leaves behind
void forget_background();

}  // namespace card

// How a loop is cut into pieces that its threads take one after the other.
#pragma once

#include <cstdint>

namespace fd {

// Pieces shrink: each round gives every thread half of its share of what is left. So threads of
// unequal speed end within a small piece of each other, and yet most units come in large pieces,
// which a weight's kernels read without a break.
class LoopPieces {
 public:
  // count: units, at least 1. grain: units worth handing to a thread, at least 1; a piece may have
  // half as many. workers: threads, at least 1.
  LoopPieces(int64_t count, int64_t grain, int workers);

  struct Piece {
    int64_t begin, end;
  };
  // Piece `number`, counted from 0; empty beyond the last one.
  Piece operator[](int64_t number) const;

 private:
  static constexpr int kMostRounds = 10;
  struct Round {
    int64_t begin, size;
  };

  Round rounds_[kMostRounds];
  int last_ = 0;  // round, which has as many pieces as it takes
  int64_t count_;
  int64_t workers_;
};

}  // namespace fd

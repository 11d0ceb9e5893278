#include "loop_pieces.h"

#include <algorithm>

namespace fd {
namespace {

// Kernels read two tiles of a weight side by side: an odd piece would leave one alone.
int64_t even(int64_t units) { return units > 1 ? units / 2 * 2 : units; }

}  // namespace

LoopPieces::LoopPieces(int64_t count, int64_t grain, int workers)
    : count_(count), workers_(workers) {
  const int64_t least = std::max<int64_t>(1, even(grain >= 4 ? grain / 2 : grain));
  int64_t begin = 0;
  for (int r = 0; r < kMostRounds; ++r) {
    const int64_t half = even((count - begin) / (2 * workers_));
    rounds_[r] = {begin, std::max(least, half)};
    last_ = r;
    if (half <= least) break;
    begin += workers_ * half;
  }
}

LoopPieces::Piece LoopPieces::operator[](int64_t number) const {
  const int64_t round = std::min<int64_t>(number / workers_, last_);
  const auto [first, size] = rounds_[round];
  const int64_t begin = std::min(count_, first + (number - round * workers_) * size);
  return {begin, std::min(count_, begin + size)};
}

}  // namespace fd

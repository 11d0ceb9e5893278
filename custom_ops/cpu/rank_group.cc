#include "rank_group.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <ctime>
#include <stdexcept>
#include <string>

#include "parallel.h"
#include "relax.h"

namespace fd {
namespace {

using Clock = std::chrono::steady_clock;

// Ranks arrive within some ten microseconds of each other when each has cores of its own; beyond
// that the core is of more use to somebody else.
constexpr std::chrono::microseconds kSpin{30};
// A sleeper looks up this often, should a bell be missed because its ringer died.
constexpr long kNapNanoseconds = 20'000'000;
constexpr int kStepBits = 32;
constexpr uint64_t kEnd = (uint64_t{1} << kStepBits) - 1;  // the operation that ends a step
constexpr int64_t kGrain = 1 << 15;                        // floats that a thread adds up at once

long futex(std::atomic<uint32_t>* word, int operation, uint32_t value, const timespec* limit) {
  return syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), operation, value, limit, nullptr, 0);
}

}  // namespace

struct RankGroup::Shared {
  struct alignas(64) Seat {
    std::atomic<uint64_t> arrived;     // step << 32 | operation
    std::atomic<uint64_t> advanced;    // step << 32 | what was done elsewhere in that step
    std::atomic<uint64_t> agreed;      // step
    std::atomic<uint32_t> unsound[2];  // by parity of the step
  };

  alignas(64) std::atomic<uint32_t> bell;
  std::atomic<uint32_t> sleepers;
  std::atomic<uint32_t> lost;
  std::atomic<uint64_t> failed_step;
  Seat seats[kMostRanks];
};

int64_t RankGroup::bytes(int ranks, int64_t floats) {
  return static_cast<int64_t>(sizeof(Shared)) + 2 * ranks * floats * int64_t{sizeof(float)};
}

RankGroup::RankGroup(void* memory, int rank, int ranks, int64_t floats)
    : shared_(static_cast<Shared*>(memory)),
      buffers_(reinterpret_cast<float*>(static_cast<char*>(memory) + sizeof(Shared))),
      rank_(rank),
      ranks_(ranks),
      floats_(floats) {
  static_assert(std::atomic<uint64_t>::is_always_lock_free && sizeof(Shared) % 64 == 0);
  if (ranks < 1 || ranks > kMostRanks || rank < 0 || rank >= ranks || floats < 1) {
    throw std::invalid_argument("rank " + std::to_string(rank) + " of " + std::to_string(ranks) +
                                " with buffers of " + std::to_string(floats) + " floats cannot be");
  }
}

float* RankGroup::buffer(int rank) const {
  return buffers_ + (2 * rank + static_cast<int>(operation_ & 1)) * floats_;
}

void RankGroup::ring() {
  shared_->bell.fetch_add(1, std::memory_order_seq_cst);
  if (shared_->sleepers.load(std::memory_order_seq_cst) != 0) {
    futex(&shared_->bell, FUTEX_WAKE, INT32_MAX, nullptr);
  }
}

void RankGroup::arrive() {
  shared_->seats[rank_].arrived.store(step_ << kStepBits | operation_, std::memory_order_release);
  ring();
}

template <typename Ready>
RankGroup::Outcome RankGroup::wait(const Ready& ready, bool inside_step, double seconds) {
  const auto begin = Clock::now();
  const auto limit = std::chrono::duration<double>(seconds);
  for (;;) {
    const uint32_t heard = shared_->bell.load(std::memory_order_seq_cst);
    // First: a rank that has failed counts as arrived everywhere, with nothing in its buffer.
    if (inside_step && shared_->failed_step.load(std::memory_order_acquire) == step_) {
      return Outcome::kFailed;
    }
    if (ready()) return Outcome::kDone;
    if (shared_->lost.load(std::memory_order_acquire) != 0) return Outcome::kLost;
    const auto waited = Clock::now() - begin;
    if (waited < kSpin) {
      for (int i = 0; i < 16; ++i) relax();
      continue;
    }
    if (waited > limit) return Outcome::kTimedOut;
    const timespec nap{0, kNapNanoseconds};
    shared_->sleepers.fetch_add(1, std::memory_order_seq_cst);
    futex(&shared_->bell, FUTEX_WAIT, heard, &nap);
    shared_->sleepers.fetch_sub(1, std::memory_order_seq_cst);
  }
}

RankGroup::Outcome RankGroup::wait_for_all(double seconds) {
  const uint64_t wanted = step_ << kStepBits | operation_;
  auto ready = [&] {
    for (int i = 0; i < ranks_; ++i) {
      if (shared_->seats[i].arrived.load(std::memory_order_acquire) < wanted) return false;
    }
    return true;
  };
  return wait(ready, true, seconds);
}

RankGroup::Outcome RankGroup::all_reduce(float* x, int64_t count, double seconds) {
  for (int64_t begin = 0; begin < count; begin += floats_) {
    const int64_t size = std::min(floats_, count - begin);
    ++operation_;
    std::memcpy(buffer(rank_), x + begin, size * sizeof(float));
    arrive();
    const Outcome outcome = wait_for_all(seconds);
    if (outcome != Outcome::kDone) return outcome;
    parallel_for(size, kGrain, [&](int64_t from, int64_t to) {
      float* sum = x + begin;
      std::memcpy(sum + from, buffer(0) + from, (to - from) * sizeof(float));
      for (int rank = 1; rank < ranks_; ++rank) {
        const float* part = buffer(rank);
        for (int64_t i = from; i < to; ++i) sum[i] += part[i];
      }
    });
  }
  return Outcome::kDone;
}

RankGroup::Outcome RankGroup::all_gather(const float* x, int64_t rows,
                                         const std::vector<int64_t>& widths, float* out,
                                         double seconds) {
  if (static_cast<int>(widths.size()) != ranks_) {
    throw std::invalid_argument("found " + std::to_string(widths.size()) + " widths for " +
                                std::to_string(ranks_) + " ranks");
  }
  const int64_t widest = *std::max_element(widths.begin(), widths.end());
  if (widest > floats_) {
    throw std::invalid_argument("a row of " + std::to_string(widest) +
                                " floats does not fit in a buffer of " + std::to_string(floats_));
  }
  int64_t total = 0;
  for (int64_t width : widths) total += width;
  const int64_t at_once = std::max<int64_t>(1, floats_ / std::max<int64_t>(widest, 1));
  for (int64_t begin = 0; begin < rows; begin += at_once) {
    const int64_t count = std::min(at_once, rows - begin);
    ++operation_;
    const int64_t own = widths[rank_];
    std::memcpy(buffer(rank_), x + begin * own, count * own * sizeof(float));
    arrive();
    const Outcome outcome = wait_for_all(seconds);
    if (outcome != Outcome::kDone) return outcome;
    int64_t column = 0;
    for (int rank = 0; rank < ranks_; ++rank) {
      const int64_t width = widths[rank];
      for (int64_t row = 0; row < count; ++row) {
        std::memcpy(out + (begin + row) * total + column, buffer(rank) + row * width,
                    width * sizeof(float));
      }
      column += width;
    }
  }
  return Outcome::kDone;
}

void RankGroup::advance() {
  shared_->seats[rank_].advanced.store(step_ << kStepBits | ++advanced_, std::memory_order_release);
}

RankGroup::Outcome RankGroup::agree(bool sound, double seconds) {
  const int parity = static_cast<int>(step_ & 1);
  Shared::Seat& own = shared_->seats[rank_];
  own.unsound[parity].store(sound ? 0 : 1, std::memory_order_relaxed);
  own.agreed.store(step_, std::memory_order_release);
  // Counts as an arrival beyond every operation of the step: nobody waits for this rank any more.
  operation_ = kEnd;
  arrive();
  const Outcome outcome = wait(
      [&] {
        for (int i = 0; i < ranks_; ++i) {
          if (shared_->seats[i].agreed.load(std::memory_order_acquire) < step_) return false;
        }
        return true;
      },
      false, seconds);
  if (outcome != Outcome::kDone) return outcome;
  bool all_sound = true;
  for (int i = 0; i < ranks_; ++i) {
    all_sound = all_sound && shared_->seats[i].unsound[parity].load(std::memory_order_relaxed) == 0;
  }
  ++step_;
  operation_ = advanced_ = 0;
  return all_sound ? Outcome::kDone : Outcome::kFailed;
}

void RankGroup::fail() {
  shared_->failed_step.store(step_, std::memory_order_release);
  ring();
}

void RankGroup::lose() {
  shared_->lost.store(1, std::memory_order_release);
  ring();
}

bool RankGroup::is_lost() const { return shared_->lost.load(std::memory_order_acquire) != 0; }

bool RankGroup::is_failing() const {
  return shared_->failed_step.load(std::memory_order_acquire) >
         shared_->seats[rank_].agreed.load(std::memory_order_acquire);
}

std::vector<uint64_t> RankGroup::arrivals() const {
  std::vector<uint64_t> found;
  for (int i = 0; i < ranks_; ++i) {
    const uint64_t arrived = shared_->seats[i].arrived.load(std::memory_order_acquire);
    const uint64_t advanced = shared_->seats[i].advanced.load(std::memory_order_acquire);
    const bool same_step = arrived >> kStepBits == advanced >> kStepBits;
    const bool has_ended = static_cast<uint32_t>(arrived) == kEnd;
    if (same_step && !has_ended) {
      found.push_back(arrived + static_cast<uint32_t>(advanced));
    } else {
      found.push_back(std::max(arrived, advanced));
    }
  }
  return found;
}

}  // namespace fd

// Sums between cards, all of which are this one.
#pragma once

#include <cstdint>
#include <vector>

namespace card {

/// Sums one after the other on each of `ranks` cards, in place: the numbers of sum c of a rank are
/// `vectors[c]` times 16 bytes of bf16 at numbers + (rank * sums + c) * `stride` such vectors.
/// `most_sent`: vectors that are sent as messages, more are fetched. `blocks`: of a card, at most.
void sum_peers(uintptr_t numbers, int64_t stride, int ranks, const std::vector<int>& vectors,
               int most_sent, int blocks, int threads);

}  // namespace card

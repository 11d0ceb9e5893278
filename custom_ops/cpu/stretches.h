// Loops over parts of rows, so that a single row is worth several threads, too.
#pragma once

#include <algorithm>
#include <cstdint>

#include "linear_kernels.h"
#include "parallel.h"

namespace fd {

// Rows are cut between groups of digits.
constexpr int64_t kBlockColumns = kGroupRows;

// Calls function(row, first, end) for the columns [first, end) of each row that belong to the
// blocks [begin, stop) of rows of `width` columns.
template <typename Function>
void each_stretch(int64_t begin, int64_t stop, int64_t width, const Function& function) {
  const int64_t blocks = (width + kBlockColumns - 1) / kBlockColumns;
  while (begin < stop) {
    const int64_t row = begin / blocks, first = begin % blocks;
    const int64_t last = std::min(blocks, first + stop - begin);
    function(row, first * kBlockColumns, std::min(width, last * kBlockColumns));
    begin += last - first;
  }
}

// Calls function(row, first, end) for stretches that make up `rows` rows of `width` columns, from
// several threads. grain: columns worth handing to one.
template <typename Function>
void parallel_stretches(int64_t rows, int64_t width, int64_t grain, const Function& function) {
  const int64_t blocks = (width + kBlockColumns - 1) / kBlockColumns;
  parallel_for(rows * blocks, std::max<int64_t>(1, grain / kBlockColumns),
               [&](int64_t begin, int64_t end) { each_stretch(begin, end, width, function); });
}

}  // namespace fd

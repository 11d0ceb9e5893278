// The search of the CCQ encoder over columns: see fastdeploy_lite/quantization/code_search.py for
// the same statement in numpy.
#pragma once

#include <cstdint>

namespace fd::cpu {

struct CodeSearch {
  int64_t columns, blocks, codes, trials;
  const float* target;  // [N, 4B], rows target_stride apart
  const float* weight;  // [N, 4B], rows weight_stride apart
  int64_t target_stride, weight_stride;
  const float* before;    // [N, 4B] contiguous, or null
  const float* metric;    // [B, 4, 4], symmetric
  const float* feedback;  // [4B, 4B] or null
  const float* books;     // [codes, 4, 256]
  const int32_t* code;    // [N]
  const float* scales;    // [N, trials]
  float* error;           // [N, 4B]
  uint8_t* packed;        // [N, B]
  int32_t* choice;        // [N]
  float* loss;            // [N]
};

// For every column and every trial scale: bytes block by block, the trial with the least loss kept
// (the first among equals). Throws std::invalid_argument for a code outside the books.
void code_search(const CodeSearch& search);

}  // namespace fd::cpu

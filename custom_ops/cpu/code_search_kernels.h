// The table of kernels of the CCQ encoder that each instruction set provides
// (cpu/isa/code_search.cc).
#pragma once

#include <cstdint>

#include "cpu_features.h"

namespace fd {

constexpr int kCodewords = 256;
constexpr int kCodeRows = 4;  // rows of a codeword

// One column of a run of blocks of four rows, everything contiguous.
struct CodeColumn {
  int64_t blocks;
  const float* book;      // [4][256]: the codewords of the column's code, row by row
  const float* half;      // [blocks][256]: half the metric's square of every codeword
  const float* metric;    // [blocks][4][4]
  const float* feedback;  // [4 blocks][4 blocks] or null: what an error adds to later targets
  const float* weight;    // [4 blocks]
  const float* before;    // [4 blocks] errors that are replaced, or null
};

// One scale that the column tries, with room of its own.
struct CodeTrial {
  float scale;
  float* target;    // [4 blocks]; later targets are moved by earlier errors
  float* error;     // [4 blocks]: weight - scale * codeword
  uint8_t* packed;  // [blocks]
  float loss;       // result: the change of the squared error
};

struct CodeSearchKernels {
  // Half the square of every codeword: half[256] of book[4][256] under metric[4][4].
  void (*half_squares)(const float* book, const float* metric, float* half);
  // Chooses the bytes of every trial, one block after another.
  void (*search_column)(const CodeColumn& column, CodeTrial* trials, int64_t count);
};

FD_DECLARE_KERNELS(CodeSearchKernels, code_search_kernels);

}  // namespace fd

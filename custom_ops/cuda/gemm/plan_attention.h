// Which of attention's kernels take a step, and how decoding sequences are cut and spread. It
// stands beside the products' plans so that there is one place to look. Host code without CUDA.
#pragma once

#include <cstdint>

#include "plan.h"

namespace fd::cuda {

struct AttentionShape {
  int tokens;
  int sequences;
  int query_heads;
  int kv_heads;
  int head_dim;
  int num_blocks;
  int table_width;

  int group() const { return query_heads / kv_heads; }  // query heads of a KV head
};

/// How decoding sequences are spread: `sequences` in one launch, so that their segments' results
/// fit `partial_floats` of scratch, on `blocks` blocks. Chosen for speed alone, results are the
/// same bits for every plan.
struct AttentionPlan {
  int sequences;
  int blocks;
  int64_t partial_floats;
};

/// partial_capacity: the most floats of scratch that the plan may ask for.
///
/// Throws std::runtime_error where one sequence needs more.
AttentionPlan plan_attention(const AttentionShape& shape, int multiprocessors,
                             int64_t partial_capacity);

/// Segments that a context of a table of `width` blocks can have. (Where they lie is part of what
/// attention is, see attention.cuh.)
int most_segments(int width);

/// Whether rows of a sequence fit a warp's tile, so that its single tokens can be decoded.
bool decodes(const AttentionShape& shape);

/// Whether some sequence may have more than one token, or none can be decoded.
bool takes_chunks(const AttentionShape& shape);

/// Whether chunks go to Hopper's kernel.
bool chunks_on_wgmma(const AttentionShape& shape, const CardFacts& card);

/// Whether one kernel turns, keeps and attends to new tokens: where each block has one segment at
/// most. With more, turning the new keys holds up the copies of the next segment, which costs more
/// than a launch saves.
bool decodes_in_one(const AttentionShape& shape, const AttentionPlan& plan);

/// Whether a kernel of its own merges the segments of so many sequences of a launch: where blocks
/// take more than one segment each.
bool merges_apart(int sequences, int kv_heads, int segments, int blocks);

}  // namespace fd::cuda

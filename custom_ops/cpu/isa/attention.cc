// Attention of a tile of query rows over blocks of keys, with an online softmax per row.
//
// What a row computes depends on the row and its keys alone, never on the tile it shares: a score
// is one chain of fused products over the head's dimensions in order, blocks are walked in order,
// values are added key by key in order. So a tile's size, the chunks of a prefill and the other
// sequences of a batch change no bit.
#include "../attention_kernels.h"
#include "lanes.h"

namespace fd::FD_ISA {
namespace {

constexpr float kMinusInfinity = -__builtin_inff();

// c[R][16 C] = c * decay (or 0 without decay) + a[R][depth] * b[depth][16 C], depth in order.
template <int R, int C>
FD_INLINE void multiply_tile(const float* a, int lda, const float* b, int ldb, int depth,
                             const float* decay, float* c, int ldc) {
  F16 sum[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int k = 0; k < C; ++k) {
      sum[r][k] = decay ? mul(load(c + r * ldc + 16 * k), splat(decay[r])) : splat(0.0f);
    }
  }
  for (int d = 0; d < depth; ++d) {
    F16 row[C];
#pragma GCC unroll 8
    for (int k = 0; k < C; ++k) row[k] = load(b + d * ldb + 16 * k);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const F16 factor = splat(a[r * lda + d]);
#pragma GCC unroll 8
      for (int k = 0; k < C; ++k) sum[r][k] = fma(factor, row[k], sum[r][k]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int k = 0; k < C; ++k) store(c + r * ldc + 16 * k, sum[r][k]);
  }
}

// Any number of rows: tiles of R rows, then the rest in one smaller tile.
template <int R>
void multiply(const float* a, int lda, const float* b, int ldb, int rows, int depth, int columns,
              const float* decay, float* c, int ldc) {
  for (; rows >= R; rows -= R) {
    int n = 0;
    for (; n + 16 * kTileCols <= columns; n += 16 * kTileCols) {
      multiply_tile<R, kTileCols>(a, lda, b + n, ldb, depth, decay, c + n, ldc);
    }
    for (; n < columns; n += 16) {
      multiply_tile<R, 1>(a, lda, b + n, ldb, depth, decay, c + n, ldc);
    }
    a += R * lda;
    c += R * ldc;
    if (decay) decay += R;
  }
  if constexpr (R > 1) {
    if (rows > 0) multiply<R - 1>(a, lda, b, ldb, rows, depth, columns, decay, c, ldc);
  }
}

// Turns the first `limit` scores of a row into e^(score - max), the others into 0; updates max and
// sum and returns the factor by which what was accumulated before shrinks.
FD_INLINE float softmax_block(float* scores, int limit, float* max_so_far, float* sum_so_far) {
  constexpr int kVectors = kBlockTokens / 16;
  F16 s[kVectors];
  F16 largest = splat(kMinusInfinity);
  for (int k = 0; k < kVectors; ++k) {
    // Scores past the limit may come from memory that was never written: replaced, not computed
    // with.
    s[k] = keep_first(load(scores + 16 * k), limit - 16 * k, kMinusInfinity);
    largest = max(s[k], largest);
  }
  const float block_max = reduce_max(largest);
  const float new_max = block_max > *max_so_far ? block_max : *max_so_far;
  for (int k = 0; k < kVectors; ++k) {
    s[k] = exp16(sub(s[k], splat(new_max)));
    store(scores + 16 * k, s[k]);
  }
  const float block_sum = reduce_add(add(add(s[0], s[1]), add(s[2], s[3])));
  float decay[16];
  store(decay, exp16(splat(*max_so_far - new_max)));
  *sum_so_far = *sum_so_far * decay[0] + block_sum;
  *max_so_far = new_max;
  return decay[0];
}

// How many keys of the block the row may see.
FD_INLINE int key_limit(const AttentionTile& tile, int row, int block) {
  const int64_t position = tile.first_position + row / tile.heads_per_token;
  const int64_t left = position + 1 - (int64_t)block * kBlockTokens;
  return left >= kBlockTokens ? kBlockTokens : left > 0 ? (int)left : 0;
}

// Of 16 keys or values, the 16 dimensions at `at`, for soon.
FD_INLINE void fetch_ahead(const float* at, int dim) {
  for (int i = 0; i < 16; ++i) __builtin_prefetch(at + i * dim, 0, 2);
}

// `next`: where the keys of the block after it lie, null if there are none.
void attend_block(const AttentionTile& tile, int block, const float* next,
                  const AttentionState& state, float* scratch) {
  const int dim = tile.head_dim;
  float* keys = scratch;                                  // [dim, 64]
  float* scores = scratch + (int64_t)dim * kBlockTokens;  // [rows, 64]
  const int64_t offset = (int64_t)tile.block_table[block] * tile.block_stride;
  const int most = key_limit(tile, tile.rows - 1, block);
  const int columns = (most + 15) / 16 * 16;
  for (int j = 0; j < columns; j += 16) {
    for (int d = 0; d < dim; d += 16) {
      // A lone token's keys and values come from memory, in pieces that the processor does not look
      // past by itself.
      fetch_ahead(tile.value_cache + offset + (int64_t)j * dim + d, dim);
      if (next) fetch_ahead(next + (int64_t)j * dim + d, dim);
      transpose16(tile.key_cache + offset + (int64_t)j * dim + d, dim,
                  keys + (int64_t)d * kBlockTokens + j, kBlockTokens);
    }
  }
  int first = 0;  // rows before it precede the block
  while (key_limit(tile, first, block) == 0) first += tile.heads_per_token;
  multiply<kTileRows>(tile.query + (int64_t)first * dim, dim, keys, kBlockTokens, tile.rows - first,
                      dim, columns, nullptr, scores + first * kBlockTokens, kBlockTokens);

  float decay[kMaxTileRows];
  for (int begin = first; begin < tile.rows;) {
    // Rows of equal limit are multiplied together and stop at it: what lies beyond is not theirs.
    const int limit = key_limit(tile, begin, block);
    int end = begin;
    for (; end < tile.rows && key_limit(tile, end, block) == limit; ++end) {
      decay[end] =
          softmax_block(scores + end * kBlockTokens, limit, state.max + end, state.sum + end);
    }
    multiply<kTileRows>(scores + begin * kBlockTokens, kBlockTokens, tile.value_cache + offset, dim,
                        end - begin, limit, dim, decay + begin, state.acc + (int64_t)begin * dim,
                        dim);
    begin = end;
  }
}

void attend(const AttentionTile& tile, int first_block, int last_block, const AttentionState& state,
            float* scratch) {
  for (int r = 0; r < tile.rows; ++r) {
    state.max[r] = kMinusInfinity;
    state.sum[r] = 0.0f;
  }
  memset(state.acc, 0, sizeof(float) * (size_t)tile.rows * (size_t)tile.head_dim);
  for (int block = first_block; block < last_block; ++block) {
    if (key_limit(tile, tile.rows - 1, block) == 0) return;
    const bool is_last = block + 1 == last_block || key_limit(tile, tile.rows - 1, block + 1) == 0;
    const float* next =
        is_last ? nullptr : tile.key_cache + tile.block_table[block + 1] * tile.block_stride;
    attend_block(tile, block, next, state, scratch);
  }
}

void merge(const AttentionState& into, const AttentionState& from, int rows, int head_dim) {
  for (int r = 0; r < rows; ++r) {
    if (from.sum[r] == 0.0f) continue;
    const float new_max = from.max[r] > into.max[r] ? from.max[r] : into.max[r];
    float factor[32];
    store(factor, exp16(splat(into.max[r] - new_max)));
    store(factor + 16, exp16(splat(from.max[r] - new_max)));
    into.max[r] = new_max;
    into.sum[r] = into.sum[r] * factor[0] + from.sum[r] * factor[16];
    float* a = into.acc + (int64_t)r * head_dim;
    const float* b = from.acc + (int64_t)r * head_dim;
    for (int d = 0; d < head_dim; d += 16) {
      const F16 kept = mul(load(a + d), splat(factor[0]));
      store(a + d, fma(load(b + d), splat(factor[16]), kept));
    }
  }
}

void finish(const AttentionState& state, int rows, int head_dim, float* out) {
  for (int r = 0; r < rows; ++r) {
    const F16 sum = splat(state.sum[r]);
    for (int64_t d = (int64_t)r * head_dim; d < (int64_t)(r + 1) * head_dim; d += 16) {
      store(out + d, div(load(state.acc + d), sum));
    }
  }
}

}  // namespace

const AttentionKernels attention_kernels = {attend, merge, finish};

}  // namespace fd::FD_ISA

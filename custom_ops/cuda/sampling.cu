// From logits to tokens: masks, penalties, the draw, log-probabilities. Logits are float32 [rows,
// vocab].
//
// Weights e^(logit - max) are summed as integers in units of 2^-44, as on the CPU: integer sums
// have no order, so a draw does not depend on how threads share the row.
#include <cstdint>

#include "common.cuh"
#include "ops.h"

namespace fd::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / kWarp;
constexpr float kWeightUnit = 17592186044416.0f;  // 2^44
constexpr float kGreedyTopP = 1e-5f;              // what FastDeploy turns top_p = 0 into
constexpr float kTinyTemperature = 1e-3f;
constexpr int kCountMask = (1 << 24) - 1;
constexpr int kPromptBit = 1 << 30;
constexpr int kBins = 2048;  // of width 1/64 below the maximum
constexpr float kBinsPerUnit = 64.0f;

using Weight = unsigned long long;

// --- masks and penalties
// -------------------------------------------------------------------------------------

__global__ void mask_kernel(float* logits, const int* bitmask, const int* rows, int vocab,
                            int words) {
  wait_for_inputs();
  const int row = rows[blockIdx.x];
  if (row < 0) return;
  for (int i = blockIdx.y * blockDim.x + threadIdx.x; i < vocab; i += gridDim.y * blockDim.x) {
    const int word = bitmask[int64_t{row} * words + i / 32];
    if (!((word >> (i % 32)) & 1)) logits[int64_t{blockIdx.x} * vocab + i] = -INFINITY;
  }
}

/// Edits of a row ascend by id: the first of an id applies all of them, in their order.
__global__ void edit_kernel(float* logits, const int* offsets, const int* ids, const float* values,
                            int vocab) {
  wait_for_inputs();
  const int begin = offsets[blockIdx.x], end = offsets[blockIdx.x + 1];
  const int step = gridDim.y * blockDim.x;
  for (int i = begin + blockIdx.y * blockDim.x + threadIdx.x; i < end; i += step) {
    const int id = ids[i];
    if (id < 0 || id >= vocab || (i > begin && ids[i - 1] == id)) continue;
    float logit = logits[int64_t{blockIdx.x} * vocab + id];
    for (int j = i; j < end && ids[j] == id; ++j) {
      const bool banned = logit == -INFINITY || values[j] == -INFINITY;
      logit = banned ? -INFINITY : logit + values[j];  // a ban beats an infinite bias
    }
    logits[int64_t{blockIdx.x} * vocab + id] = logit;
  }
}

__device__ float block_max(float value) {
  __shared__ float tops[kWarps];
  value = warp_max(value);
  if (threadIdx.x % kWarp == 0) tops[threadIdx.x / kWarp] = value;
  __syncthreads();
  float top = tops[0];
  for (unsigned i = 1; i < blockDim.x / kWarp; ++i) top = fmaxf(top, tops[i]);
  __syncthreads();
  return top;
}

__device__ __forceinline__ float penalise(float x, int seen, float repetition, float frequency,
                                          float presence) {
  const int times = seen & kCountMask;
  if (seen != 0) x = x > 0.0f ? x / repetition : x * repetition;
  return times > 0 ? x - frequency * static_cast<float>(times) - presence : x;
}

__global__ void penalty_kernel(float* logits, const int* slots, const int* occurrences,
                               const float* repetition, const float* frequency,
                               const float* presence, const float* temperature, int vocab) {
  wait_for_inputs();
  const int r = blockIdx.x;
  const float t = temperature[r], rep = repetition[r], freq = frequency[r], pres = presence[r];
  const bool penalised = occurrences != nullptr && (rep != 1.0f || freq != 0.0f || pres != 0.0f);
  const bool scaled = t != 0.0f && t != 1.0f;
  if (!penalised && !scaled) return;
  float* row = logits + int64_t{r} * vocab;
  const int* seen = penalised ? occurrences + int64_t{slots[r]} * vocab : nullptr;
  // A tiny temperature could overflow the quotient: the row's maximum is moved to 0 first. That
  // needs the whole penalised row, so one block does it alone.
  const bool tiny = scaled && t < kTinyTemperature;
  if (tiny && blockIdx.y != 0) return;
  const int begin = (tiny ? 0 : blockIdx.y * blockDim.x) + threadIdx.x;
  const int step = tiny ? blockDim.x : gridDim.y * blockDim.x;
  float shift = 0.0f;
  if (tiny) {
    float top = -INFINITY;
    for (int i = begin; i < vocab; i += step) {
      top = fmaxf(top, penalised ? penalise(row[i], seen[i], rep, freq, pres) : row[i]);
    }
    top = block_max(top);
    shift = isfinite(top) ? top : 0.0f;
  }
  for (int i = begin; i < vocab; i += step) {
    float x = row[i];
    if (penalised) x = penalise(x, seen[i], rep, freq, pres);
    row[i] = scaled ? (x - shift) / t : x;
  }
}

__global__ void occurrence_kernel(int* occurrences, const int* slots, const int* ids, int count,
                                  bool prompt, int slot_count, int vocab) {
  wait_for_inputs();
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const int slot = slots[i], id = ids[i];
  if (slot < 0 || slot >= slot_count || id < 0 || id >= vocab) return;
  int* entry = occurrences + int64_t{slot} * vocab + id;
  if (prompt) {
    atomicOr(entry, kPromptBit);
  } else if ((*entry & kCountMask) != kCountMask) {
    atomicAdd(entry, 1);
  }
}

// --- one row, one block
// --------------------------------------------------------------------------------------

/// Order-preserving integer: a larger logit has a larger key. No finite or infinite float maps to
/// 0.
__device__ __forceinline__ uint32_t key_of(float x) {
  const uint32_t bits = __float_as_uint(x == 0.0f ? 0.0f : x);  // -0 equals +0
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float logit_of(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

struct Row {
  const float* logits;
  int vocab;
  float max;
  float min_p;

  __device__ float share(float x) const { return x == max ? 1.0f : expf(x - max); }
  __device__ bool allowed(float x) const { return min_p <= 0.0f || share(x) >= min_p; }
  __device__ Weight weight(float x) const {
    const float e = share(x);
    return e < min_p ? 0 : static_cast<Weight>(__float2ull_rn(e * kWeightUnit));
  }
  /// Bin by distance from the maximum; monotone in x, so bins are intervals of keys.
  __device__ int bin(float x) const {
    if (x == max) return 0;
    const float distance = (max - x) * kBinsPerUnit;
    return distance < kBins - 1 ? static_cast<int>(distance) : kBins - 1;
  }
};

/// Calls visit(id, logit) for the thread's tokens of a row, ids ascending. Several loads are under
/// way at once: a block alone on its SM would otherwise wait for each.
template <typename Visit>
__device__ __forceinline__ void sweep(const float* logits, int vocab, Visit visit) {
  constexpr int kTogether = 8;
  for (int first = threadIdx.x; first < vocab; first += kTogether * kThreads) {
    float x[kTogether];
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      const int i = first + j * kThreads;
      x[j] = i < vocab ? logits[i] : 0.0f;
    }
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      const int i = first + j * kThreads;
      if (i < vocab) visit(i, x[j]);
    }
  }
}

/// The tokens kept so far: those with a larger key, and the first `equals` (by id) that have this
/// key.
struct Limit {
  uint32_t key;
  int equals;
};

struct Shared {
  Weight bins[kBins];
  Weight warp_sums[kWarps];
  Weight before;  // sum of all bins ahead of the chosen one
  int chosen;
  int first_id;
  int nan;
  Limit limit;
  Weight total;
};

/// Finds the first bin at which the running sum reaches `target` (at least 1, at most the sum of
/// all `count` bins).
__device__ void choose_bin(Shared& s, int count, Weight target) {
  __syncthreads();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int per_thread = kBins / kThreads;
  Weight own = 0;
  const int first = threadIdx.x * per_thread;
  for (int i = 0; i < per_thread; ++i) own += first + i < count ? s.bins[first + i] : 0;
  Weight upto = own;
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const Weight other = __shfl_up_sync(kFullMask, upto, offset);
    if (lane >= offset) upto += other;
  }
  if (lane == kWarp - 1) s.warp_sums[warp] = upto;
  __syncthreads();
  Weight ahead = upto - own;
  for (int w = 0; w < warp; ++w) ahead += s.warp_sums[w];
  if (ahead < target && target <= ahead + own) {
    for (int i = 0; i < per_thread; ++i) {
      const Weight here = s.bins[first + i];
      if (target <= ahead + here) {
        s.chosen = first + i;
        s.before = ahead;
        break;
      }
      ahead += here;
    }
  }
  __syncthreads();
}

__device__ void clear_bins(Shared& s, int count) {
  __syncthreads();
  for (int i = threadIdx.x; i < count; i += kThreads) s.bins[i] = 0;
  __syncthreads();
}

/// The smallest set of best tokens, within `inside`, whose values reach `target`; `value` is 1 for
/// a count or the weight. First the bin by distance, then the exact key by four 8-bit digits over
/// that bin alone.
template <typename Value>
__device__ Limit select(Shared& s, const Row& row, const Limit& inside, Weight target,
                        Value value) {
  const float edge = logit_of(inside.key);
  const Weight edge_value = inside.equals > 0 ? value(edge) * inside.equals : 0;
  clear_bins(s, kBins);
  Weight far = 0;  // most of a vocabulary can lie in the last bin: no atomics there
  sweep(row.logits, row.vocab, [&](int, float x) {
    if (key_of(x) <= inside.key) return;
    const Weight v = value(x);
    if (v == 0) return;
    const int bin = row.bin(x);
    if (bin == kBins - 1) {
      far += v;
    } else {
      atomicAdd(&s.bins[bin], v);
    }
  });
  if (far != 0) atomicAdd(&s.bins[kBins - 1], far);
  if (threadIdx.x == 0 && edge_value != 0) atomicAdd(&s.bins[row.bin(edge)], edge_value);
  choose_bin(s, kBins, target);
  const int bin = s.chosen;
  Weight before = s.before;
  uint32_t prefix = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    clear_bins(s, 256);
    const uint32_t mask = shift == 24 ? 0u : 0xffffffffu << (shift + 8);
    sweep(row.logits, row.vocab, [&](int, float x) {
      const uint32_t key = key_of(x);
      if (key <= inside.key || (key & mask) != prefix || row.bin(x) != bin) return;
      const Weight v = value(x);
      if (v != 0) atomicAdd(&s.bins[255 - ((key >> shift) & 255u)], v);  // best digit first
    });
    if (threadIdx.x == 0 && edge_value != 0 && (inside.key & mask) == prefix &&
        row.bin(edge) == bin) {
      atomicAdd(&s.bins[255 - ((inside.key >> shift) & 255u)], edge_value);
    }
    choose_bin(s, 256, target - before);
    prefix |= static_cast<uint32_t>(255 - s.chosen) << shift;
    before += s.before;
  }
  const Weight each = value(logit_of(prefix));
  return {prefix, static_cast<int>((target - before + each - 1) / each)};
}

__device__ Weight block_sum(Shared& s, Weight value) {
  for (int offset = 16; offset > 0; offset >>= 1)
    value += __shfl_xor_sync(kFullMask, value, offset);
  __syncthreads();
  if (threadIdx.x % kWarp == 0) s.warp_sums[threadIdx.x / kWarp] = value;
  __syncthreads();
  Weight total = 0;
  for (int w = 0; w < kWarps; ++w) total += s.warp_sums[w];
  return total;
}

template <typename Value>
__device__ Weight sum_above(Shared& s, const Row& row, const Limit& limit, Value value) {
  Weight sum = 0;
  sweep(row.logits, row.vocab, [&](int, float x) {
    if (key_of(x) > limit.key) sum += value(x);
  });
  return block_sum(s, sum);
}

/// Reads the row once: maximum, its lowest id, faults. Returns false for NaN or a row without a
/// token.
__device__ bool open_row(Shared& s, Row& row) {
  if (threadIdx.x == 0) {
    s.nan = 0;
    s.first_id = row.vocab;
  }
  float top = -INFINITY;
  int id = row.vocab;
  bool nan = false;
  sweep(row.logits, row.vocab, [&](int i, float x) {
    nan |= isnan(x);
    if (x > top) {
      top = x;
      id = i;
    }
  });
  row.max = block_max(top);  // its barriers order the initialisation above
  if (nan) s.nan = 1;
  if (top == row.max && id < row.vocab) atomicMin(&s.first_id, id);
  __syncthreads();
  return s.nan == 0 && row.max != -INFINITY;
}

// --- the draw
// ------------------------------------------------------------------------------------------------

__device__ Weight uniform_bits(int64_t seed, int64_t step) {
  uint32_t x[4] = {static_cast<uint32_t>(step),
                   static_cast<uint32_t>(static_cast<uint64_t>(step) >> 32), 0, 0};
  uint32_t key[2] = {static_cast<uint32_t>(seed),
                     static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32)};
  for (int round = 0; round < 10; ++round) {  // Philox4x32-10
    const uint64_t a = uint64_t{0xD2511F53} * x[0];
    const uint64_t b = uint64_t{0xCD9E8D57} * x[2];
    x[0] = static_cast<uint32_t>(b >> 32) ^ x[1] ^ key[0];
    x[1] = static_cast<uint32_t>(b);
    x[2] = static_cast<uint32_t>(a >> 32) ^ x[3] ^ key[1];
    x[3] = static_cast<uint32_t>(a);
    key[0] += 0x9E3779B9u;
    key[1] += 0xBB67AE85u;
  }
  return x[0] | Weight{x[1]} << 32;
}

/// ceil(fraction * total), exact: a float32 of at least 2^-17 is a multiple of 2^-41.
__device__ Weight fraction_of(float fraction, Weight total) {
  const Weight numerator = static_cast<Weight>(ldexpf(fraction, 41));
  const Weight high = __umul64hi(numerator, total), low = numerator * total;
  const Weight floor = high << 23 | low >> 41;
  return floor + ((low & ((Weight{1} << 41) - 1)) != 0 ? 1 : 0);
}

/// A warp's contiguous part of the row.
struct Segment {
  int begin, end;
};

__device__ Segment warp_segment(int vocab) {
  const int size = (vocab + kThreads - 1) / kThreads * kWarp;
  const int begin = min(static_cast<int>(threadIdx.x / kWarp) * size, vocab);
  return {begin, min(begin + size, vocab)};
}

/// Inclusive sum over the lanes of a warp.
__device__ Weight warp_scan(Weight value) {
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const Weight other = __shfl_up_sync(kFullMask, value, offset);
    if (static_cast<int>(threadIdx.x % kWarp) >= offset) value += other;
  }
  return value;
}

/// The token at which the running sum of kept weights, in order of ids, passes point = uniform *
/// total.
__device__ int draw(Shared& s, const Row& row, const Limit& limit, Weight uniform) {
  __shared__ int equal_count[kWarps];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const Segment part = warp_segment(row.vocab);
  Weight sum = 0;
  int equals = 0;
#pragma unroll 8
  for (int i = part.begin + lane; i < part.end; i += kWarp) {
    const float x = row.logits[i];
    const uint32_t key = key_of(x);
    if (key > limit.key) sum += row.weight(x);
    equals += key == limit.key;
  }
  for (int offset = 16; offset > 0; offset >>= 1) {
    sum += __shfl_xor_sync(kFullMask, sum, offset);
    equals += __shfl_xor_sync(kFullMask, equals, offset);
  }
  __syncthreads();
  if (lane == 0) {
    s.warp_sums[warp] = sum;
    equal_count[warp] = equals;
  }
  __syncthreads();
  const Weight equal_weight = limit.equals > 0 ? row.weight(logit_of(limit.key)) : 0;
  Weight total = 0, ahead = 0, own = 0;
  int taken = 0, taken_before = 0;
  for (int w = 0; w < kWarps; ++w) {
    const int kept = min(equal_count[w], limit.equals - taken);
    const Weight here = s.warp_sums[w] + equal_weight * kept;
    if (w == warp) {
      ahead = total;
      own = here;
      taken_before = taken;
    }
    total += here;
    taken += kept;
  }
  const Weight point = __umul64hi(uniform, total);
  if (point >= ahead && point < ahead + own) {  // exactly one warp
    Weight before = ahead;
    int rank = taken_before;
    for (int i0 = part.begin; i0 < part.end; i0 += kWarp) {
      const int i = i0 + lane;
      const uint32_t key = i < part.end ? key_of(row.logits[i]) : 0;
      const bool equal = i < part.end && key == limit.key;
      const unsigned equal_lanes = __ballot_sync(kFullMask, equal);
      const int my_rank = rank + __popc(equal_lanes & ((1u << lane) - 1));
      Weight w = 0;
      if (i < part.end && key > limit.key) w = row.weight(row.logits[i]);
      if (equal && my_rank < limit.equals) w = equal_weight;
      const Weight upto = before + warp_scan(w);
      const unsigned past = __ballot_sync(kFullMask, upto > point);
      if (past != 0) {
        if (lane == 0) s.chosen = i0 + __ffs(past) - 1;
        break;
      }
      before = __shfl_sync(kFullMask, upto, kWarp - 1);
      rank += __popc(equal_lanes);
    }
  }
  __syncthreads();
  return s.chosen;
}

/// The last token that min_p, top_k and top_p keep.
__device__ Limit keep(Shared& s, const Row& row, int top_k, float top_p) {
  Limit limit{0, 0};
  auto count = [&row](float x) { return static_cast<Weight>(row.allowed(x)); };
  auto weight = [&row](float x) { return row.weight(x); };
  if (top_k > 0 && top_k < row.vocab &&
      sum_above(s, row, limit, count) > static_cast<Weight>(top_k)) {
    limit = select(s, row, limit, top_k, count);
  }
  if (top_p < 1.0f) {
    Weight total = sum_above(s, row, limit, weight);
    if (limit.equals > 0) total += row.weight(logit_of(limit.key)) * limit.equals;
    limit = select(s, row, limit, fraction_of(top_p, total), weight);
  }
  return limit;
}

__global__ void __launch_bounds__(kThreads, 1)
    sample_kernel(const float* logits, const float* temperature, const int* top_k,
                  const float* top_p, const float* min_p, const int64_t* seeds,
                  const int64_t* steps, const int* forced, int* out, int vocab) {
  wait_for_inputs();
  __shared__ Shared s;
  const int r = blockIdx.x;
  if (forced[r] >= 0) {
    if (threadIdx.x == 0) out[r] = forced[r];
    return;
  }
  Row row{logits + int64_t{r} * vocab, vocab, 0.0f, min_p[r]};
  if (!open_row(s, row)) {
    if (threadIdx.x == 0) out[r] = -1;
    return;
  }
  int token = s.first_id;
  if (temperature[r] != 0.0f && top_k[r] != 1 && top_p[r] > kGreedyTopP) {
    const Limit limit = keep(s, row, top_k[r], top_p[r]);
    token = draw(s, row, limit, uniform_bits(seeds[r], steps[r]));
  }
  if (threadIdx.x == 0) out[r] = token;
}

// --- log-probabilities
// ---------------------------------------------------------------------------------------

struct Ranked {
  uint32_t key;
  int id;
  __device__ bool before(const Ranked& other) const {
    return key > other.key || (key == other.key && id < other.id);
  }
};

__device__ void bitonic_sort(Ranked* list, int size) {
  for (int k = 2; k <= size; k *= 2) {
    for (int j = k / 2; j > 0; j /= 2) {
      __syncthreads();
      const int i = threadIdx.x, other = i ^ j;
      if (i < size && other > i) {
        const bool ascending = (i & k) == 0;
        if (list[other].before(list[i]) == ascending) {
          const Ranked held = list[i];
          list[i] = list[other];
          list[other] = held;
        }
      }
    }
  }
  __syncthreads();
}

__device__ float logprob_of(const Row& row, float x, double log_total) {
  if (isinf(row.max)) return x == row.max ? static_cast<float>(-log_total) : -3.402823466e38f;
  const double value = static_cast<double>(x) - row.max - log_total;
  return static_cast<float>(fmax(value, -3.4028234663852886e38));
}

/// Collects the k best tokens, best first, into `list` (a power of two of room).
__device__ void best_tokens(Shared& s, const Row& row, int k, Ranked* list) {
  __shared__ int used, equal_used;
  int room = 1;
  while (room < k) room *= 2;
  Limit limit{0, 0};
  if (k < row.vocab) {
    limit = select(s, row, limit, k, [](float) { return Weight{1}; });
  }
  __syncthreads();
  if (threadIdx.x == 0) used = equal_used = 0;
  if (static_cast<int>(threadIdx.x) < room) list[threadIdx.x] = {0u, row.vocab};
  __syncthreads();
  sweep(row.logits, row.vocab, [&](int i, float x) {
    const uint32_t key = key_of(x);
    if (key > limit.key) list[atomicAdd(&used, 1)] = {key, i};
  });
  __syncthreads();
  // equal logits enter by ascending id: a sweep in order, 1024 ids at a time
  for (int i0 = 0; i0 < row.vocab && equal_used < limit.equals; i0 += kThreads) {
    const int i = i0 + threadIdx.x;
    const bool equal = i < row.vocab && key_of(row.logits[i]) == limit.key;
    const Weight upto = warp_scan(equal);
    __syncthreads();
    if (threadIdx.x % kWarp == kWarp - 1) s.warp_sums[threadIdx.x / kWarp] = upto;
    __syncthreads();
    int at = equal_used + static_cast<int>(upto) - 1, all = 0;
    for (int w = 0; w < kWarps; ++w) {
      if (w < static_cast<int>(threadIdx.x / kWarp)) at += static_cast<int>(s.warp_sums[w]);
      all += static_cast<int>(s.warp_sums[w]);
    }
    if (equal && at < limit.equals) list[used + at] = {limit.key, i};
    __syncthreads();
    if (threadIdx.x == 0) equal_used += all;
    __syncthreads();
  }
  bitonic_sort(list, room);
}

__global__ void __launch_bounds__(kThreads, 1)
    logprobs_kernel(const float* logits, const int* tokens, int k, float* out_logprob,
                    int* out_rank, int* out_ids, float* out_logprobs, int vocab) {
  wait_for_inputs();
  __shared__ Shared s;
  __shared__ Ranked list[kMaxTopLogprobs];
  const int r = blockIdx.x;
  Row row{logits + int64_t{r} * vocab, vocab, 0.0f, 0.0f};
  const int token = tokens[r];
  if (!open_row(s, row) || token < 0 || token >= vocab) {
    if (threadIdx.x == 0) {
      out_logprob[r] = NAN;
      out_rank[r] = -1;
    }
    for (int i = threadIdx.x; i < k; i += kThreads) {
      out_ids[int64_t{r} * k + i] = -1;
      out_logprobs[int64_t{r} * k + i] = NAN;
    }
    return;
  }
  const float own = row.logits[token];
  Weight weights = 0, better = 0;
  sweep(row.logits, vocab, [&](int i, float x) {
    weights += row.weight(x);
    better += x > own || (x == own && i < token);
  });
  weights = block_sum(s, weights);
  better = block_sum(s, better);
  const double log_total = log(static_cast<double>(weights) / kWeightUnit);
  if (threadIdx.x == 0) {
    out_logprob[r] = logprob_of(row, own, log_total);
    out_rank[r] = static_cast<int>(better) + 1;
  }
  if (k == 0) return;
  best_tokens(s, row, k, list);
  for (int i = threadIdx.x; i < k; i += kThreads) {
    out_ids[int64_t{r} * k + i] = list[i].id;
    out_logprobs[int64_t{r} * k + i] = logprob_of(row, row.logits[list[i].id], log_total);
  }
}

}  // namespace

void mask_logits(float* logits, const int* bitmask, const int* rows, int count, int vocab,
                 int words, cudaStream_t stream) {
  launch("mask_logits", mask_kernel, dim3(count, 32), 256, 0, stream, logits, bitmask, rows, vocab,
         words);
}

void process_logits(float* logits, const int* slots, const int* occurrences,
                    const float* repetition, const float* frequency, const float* presence,
                    const float* temperature, const int* edit_offsets, const int* edit_ids,
                    const float* edit_values, int rows, int vocab, cudaStream_t stream) {
  launch("process_logits: edits", edit_kernel, dim3(rows, 8), 256, 0, stream, logits, edit_offsets,
         edit_ids, edit_values, vocab);
  launch("process_logits: penalties", penalty_kernel, dim3(rows, 32), kThreads, 0, stream, logits,
         slots, occurrences, repetition, frequency, presence, temperature, vocab);
}

void update_occurrences(int* occurrences, const int* slots, const int* ids, int count, bool prompt,
                        int slot_count, int vocab, cudaStream_t stream) {
  if (count == 0) return;
  launch("update_occurrences", occurrence_kernel, ceil_div(count, 256), 256, 0, stream, occurrences,
         slots, ids, count, prompt, slot_count, vocab);
}

void sample(const float* logits, const float* temperature, const int* top_k, const float* top_p,
            const float* min_p, const int64_t* seeds, const int64_t* steps, const int* forced,
            int* out, int rows, int vocab, cudaStream_t stream) {
  launch("sample", sample_kernel, rows, kThreads, 0, stream, logits, temperature, top_k, top_p,
         min_p, seeds, steps, forced, out, vocab);
}

void token_logprobs(const float* logits, const int* tokens, int k, float* out_logprob,
                    int* out_rank, int* out_ids, float* out_logprobs, int rows, int vocab,
                    cudaStream_t stream) {
  if (k > kMaxTopLogprobs) {
    throw std::runtime_error("token_logprobs: k is " + std::to_string(k) +
                             ", at most 1024 on a card");
  }
  launch("token_logprobs", logprobs_kernel, rows, kThreads, 0, stream, logits, tokens, k,
         out_logprob, out_rank, out_ids, out_logprobs, vocab);
}

}  // namespace fd::cuda

#include "attention.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "attention_kernels.h"
#include "parallel.h"

namespace fd::cpu {
namespace {

// Query tokens of one sequence under one KV head, and one range of the keys' partitions.
struct Unit {
  int64_t sequence;
  int64_t first_query;  // index among the sequence's tokens of this step
  int tokens;
  int kv_head;
  int first_partition;
  int last_partition;
  int64_t state;  // index of the partition's state in the shared buffer; -1: finish here
};

[[noreturn]] void fail(const std::string& what) {
  throw std::invalid_argument("paged_attention: " + what);
}

void check_sequences(const AttentionArguments& a) {
  if (a.first_token[0] != 0) {
    fail("cu_seqlens_q begins with " + std::to_string(a.first_token[0]) + ", expected 0");
  }
  if (a.first_token[a.sequences] != a.tokens) {
    fail("cu_seqlens_q ends with " + std::to_string(a.first_token[a.sequences]) + ", q has " +
         std::to_string(a.tokens) + " tokens");
  }
  for (int64_t b = 0; b < a.sequences; ++b) {
    const std::string index = "[" + std::to_string(b) + "]";
    const int64_t queries = int64_t{a.first_token[b + 1]} - a.first_token[b];
    if (queries < 0) fail("cu_seqlens_q decreases after entry " + std::to_string(b));
    if (a.context_length[b] < queries) {
      fail("context_lens" + index + " is " + std::to_string(a.context_length[b]) +
           ", less than the sequence's " + std::to_string(queries) + " tokens of this step");
    }
    const int64_t blocks = (int64_t{a.context_length[b]} + kBlockTokens - 1) / kBlockTokens;
    if (queries == 0) continue;
    if (blocks > a.max_blocks) {
      fail("context_lens" + index + " needs " + std::to_string(blocks) +
           " blocks, block_tables has " + std::to_string(a.max_blocks) + " columns");
    }
    for (int64_t i = 0; i < blocks; ++i) {
      const int32_t block = a.block_tables[b * a.max_blocks + i];
      if (block < 0 || block >= a.cache.num_blocks) {
        fail("block_tables" + index + "[" + std::to_string(i) + "] is " + std::to_string(block) +
             ", the cache has blocks 0 to " + std::to_string(a.cache.num_blocks - 1));
      }
    }
  }
}

struct Plan {
  std::vector<Unit> units;
  std::vector<Unit> split;  // one entry per tile whose partitions are units of their own
  int64_t states = 0;
};

class Attention {
 public:
  explicit Attention(const AttentionArguments& args)
      : a_(args),
        kernels_(pick(attention_kernels_tables)),
        group_(args.query_heads / args.cache.kv_heads),
        tile_tokens_(std::max(1, kMaxTileRows / group_)),
        state_floats_(kMaxTileRows * (args.cache.head_dim + 2)) {}

  void run() {
    const Plan plan = make_plan();
    std::vector<float> states(plan.states * state_floats_);
    parallel_for(plan.units.size(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) attend(plan.units[i], states.data());
    });
    parallel_for(plan.split.size(), 4, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) combine(plan.split[i], states.data());
    });
  }

 private:
  int partitions(int64_t sequence, int64_t last_query) const {
    const int64_t queries = a_.first_token[sequence + 1] - a_.first_token[sequence];
    const int64_t seen = a_.context_length[sequence] - queries + last_query + 1;
    constexpr int64_t kTokens = int64_t{kPartitionBlocks} * kBlockTokens;
    return static_cast<int>((seen + kTokens - 1) / kTokens);
  }

  std::vector<Unit> tiles() const {
    std::vector<Unit> found;
    for (int64_t b = 0; b < a_.sequences; ++b) {
      const int64_t queries = a_.first_token[b + 1] - a_.first_token[b];
      for (int head = 0; head < a_.cache.kv_heads; ++head) {
        for (int64_t q = 0; q < queries; q += tile_tokens_) {
          const int tokens = static_cast<int>(std::min<int64_t>(tile_tokens_, queries - q));
          found.push_back({b, q, tokens, head, 0, partitions(b, q + tokens - 1), -1});
        }
      }
    }
    return found;
  }

  // The partitions of a tile are independent until they are merged, so few tiles with long contexts
  // (a lone decode) can still occupy all threads. Where they run changes no bit.
  Plan make_plan() const {
    Plan plan;
    std::vector<Unit> all = tiles();
    const bool few = static_cast<int64_t>(all.size()) < 2 * int64_t{num_threads()};
    for (Unit& tile : all) {
      if (!few || tile.last_partition == 1 || num_threads() == 1) {
        plan.units.push_back(tile);
        continue;
      }
      tile.state = plan.states;
      for (int p = 0; p < tile.last_partition; ++p) {
        Unit part = tile;
        part.first_partition = p;
        part.last_partition = p + 1;
        part.state = plan.states++;
        plan.units.push_back(part);
      }
      plan.split.push_back(tile);
    }
    return plan;
  }

  AttentionState state_at(float* memory) const {
    return {memory, memory + kMaxTileRows, memory + 2 * kMaxTileRows};
  }

  void attend(const Unit& unit, float* states) const {
    const int dim = a_.cache.head_dim;
    static thread_local std::vector<float> memory;
    const int64_t scratch_floats = attention_scratch_floats(dim);
    const int64_t query_floats = int64_t{kMaxTileRows} * dim;
    memory.resize(
        std::max<size_t>(memory.size(), query_floats + 2 * state_floats_ + scratch_floats));
    float* query = memory.data();
    float* own = query + query_floats;
    float* scratch = own + 2 * state_floats_;
    const AttentionTile tile = make_tile(unit, query);
    const AttentionState total =
        state_at(unit.state < 0 ? own : states + unit.state * state_floats_);
    const AttentionState next = state_at(own + state_floats_);
    for (int p = unit.first_partition; p < unit.last_partition; ++p) {
      const bool first = p == unit.first_partition;
      kernels_.attend(tile, p * kPartitionBlocks, (p + 1) * kPartitionBlocks, first ? total : next,
                      scratch);
      if (!first) kernels_.merge(total, next, tile.rows, dim);
    }
    if (unit.state < 0) write(unit, total, query);
  }

  void combine(const Unit& unit, float* states) const {
    const int rows = unit.tokens * group_, dim = a_.cache.head_dim;
    const AttentionState total = state_at(states + unit.state * state_floats_);
    for (int p = 1; p < unit.last_partition; ++p) {
      kernels_.merge(total, state_at(states + (unit.state + p) * state_floats_), rows, dim);
    }
    write(unit, total, total.acc);
  }

  int64_t row_offset(const Unit& unit, int token) const {
    const int64_t t = a_.first_token[unit.sequence] + unit.first_query + token;
    return (t * a_.query_heads + int64_t{unit.kv_head} * group_) * a_.cache.head_dim;
  }

  AttentionTile make_tile(const Unit& unit, float* query) const {
    const int dim = a_.cache.head_dim, row = group_ * dim;
    for (int t = 0; t < unit.tokens; ++t) {
      const float* from = a_.query + row_offset(unit, t);
      for (int i = 0; i < row; ++i) query[t * row + i] = from[i] * a_.scale;
    }
    const int64_t queries = a_.first_token[unit.sequence + 1] - a_.first_token[unit.sequence];
    const int64_t head = int64_t{unit.kv_head} * kBlockTokens * dim;
    return {query,
            unit.tokens * group_,
            group_,
            a_.context_length[unit.sequence] - queries + unit.first_query,
            dim,
            a_.key_cache + head,
            a_.value_cache + head,
            int64_t{a_.cache.kv_heads} * kBlockTokens * dim,
            a_.block_tables + unit.sequence * a_.max_blocks};
  }

  void write(const Unit& unit, const AttentionState& state, float* rows) const {
    const int row = group_ * a_.cache.head_dim;
    kernels_.finish(state, unit.tokens * group_, a_.cache.head_dim, rows);
    for (int t = 0; t < unit.tokens; ++t) {
      std::copy_n(rows + t * row, row, a_.out + row_offset(unit, t));
    }
  }

  const AttentionArguments& a_;
  const AttentionKernels& kernels_;
  const int group_;  // query heads of a KV head
  const int tile_tokens_;
  const int64_t state_floats_;
};

}  // namespace

void paged_attention(const AttentionArguments& args) {
  check_sequences(args);
  if (args.tokens > 0) Attention(args).run();
}

}  // namespace fd::cpu

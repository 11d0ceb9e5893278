// An index of every substring of some token sequences, built online in linear time: a suffix
// automaton (the suffix tree of the reversed text), with how often each substring occurred and when
// it was seen last. It answers what followed the longest suffix of a context that is known.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace fd::cpu {

// Tokens that are likely to follow, and for each the share of the occurrences that went this way
// so far (a product: it never rises). `matched` is the length of the context that they follow.
struct SuffixDraft {
  std::vector<int32_t> tokens;
  std::vector<float> shares;
  int32_t matched = 0;
};

// Edges by state and token: one array with linear probing, since a node for each edge would cost
// more time to allocate and to free than all the rest of the index.
class EdgeTable {
 public:
  static constexpr int32_t kNone = -1;

  EdgeTable() : slots_(kFirstSlots) {}
  int32_t find(uint64_t key) const {
    for (size_t i = home(key);; i = (i + 1) & (slots_.size() - 1)) {
      if (slots_[i].edge == kNone || slots_[i].key == key) return slots_[i].edge;
    }
  }
  // `key` must not be in the table.
  void insert(uint64_t key, int32_t edge);
  int64_t nbytes() const { return static_cast<int64_t>(slots_.size() * sizeof(Slot)); }

 private:
  static constexpr size_t kFirstSlots = 64;  // a power of two, as all sizes are
  struct Slot {
    uint64_t key = 0;
    int32_t edge = kNone;
  };
  size_t home(uint64_t key) const {
    return ((key * 0x9E3779B97F4A7C15ull) >> 32) & (slots_.size() - 1);
  }
  void place(uint64_t key, int32_t edge);

  std::vector<Slot> slots_;
  size_t count_ = 0;
};

class SuffixIndex {
 public:
  // The longest known end of some text: its state, and how many tokens of the state's substrings
  // the text ends with. It is out of date once the index grows.
  struct Place {
    int32_t state = 0;
    int32_t matched = 0;
  };

  SuffixIndex();

  // Begins another sequence; matches do not run across the boundary.
  void start_sequence() { last_ = kRoot; }
  // Appends tokens to the sequence that was started last.
  void extend(const std::vector<int32_t>& tokens);

  // What followed the longest end of the sequence that had occurred before in it. For an index of
  // one sequence.
  SuffixDraft propose_repeat(int32_t most, float least_share) const;
  // What followed the longest end of `context` that occurs in the index.
  SuffixDraft propose(const std::vector<int32_t>& context, int32_t most, float least_share) const;
  // The same in two parts: where a text leads, a token at a time, and what followed there.
  Place step(Place place, int32_t token) const;
  SuffixDraft propose_at(Place place, int32_t most, float least_share) const;

  int64_t num_tokens() const { return num_tokens_; }
  // Estimate of the memory held.
  int64_t nbytes() const;

 private:
  static constexpr int32_t kRoot = 0;
  static constexpr int32_t kNone = -1;
  // Counts are kept for this many of the longest substrings that end at a token: a text like "aaaa"
  // has a new one for every token, and to count them all would make the index quadratic.
  static constexpr int kCountedSubstrings = 64;

  struct State {
    int32_t length;      // of the longest substring
    int32_t link;        // the longest suffix that occurs elsewhere, too
    int32_t first_edge;  // of a list, the newest first
    int32_t count;
    int32_t seen;  // when a substring of this state ended last, in tokens
  };
  struct Edge {
    int32_t token;
    int32_t target;
    int32_t next;
  };

  static uint64_t key(int32_t state, int32_t token) {
    return (static_cast<uint64_t>(static_cast<uint32_t>(state)) << 32) |
           static_cast<uint32_t>(token);
  }
  int32_t next(int32_t state, int32_t token) const;
  void connect(int32_t state, int32_t token, int32_t target);
  int32_t add_state(int32_t length, int32_t link);
  // Splits from `target` the substrings that also end after `from` + token.
  int32_t split(int32_t from, int32_t token, int32_t target);
  int32_t append(int32_t token);
  SuffixDraft follow(int32_t state, int32_t matched, int32_t most, float least_share) const;

  std::vector<State> states_;
  std::vector<Edge> edges_;
  EdgeTable edge_of_;
  int32_t last_ = kRoot;
  int64_t num_tokens_ = 0;
};

}  // namespace fd::cpu

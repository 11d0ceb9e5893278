// What guesses the next tokens of a sequence from tokens that were read or written before.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <utility>
#include <vector>

#include "suffix_index.h"

namespace fd::cpu {

// Guessed tokens, and how many tokens before them had occurred in the same order.
using Draft = std::pair<std::vector<int32_t>, int32_t>;

// The memory of one sequence.
class Drafter {
 public:
  virtual ~Drafter() = default;
  // Appends tokens of the sequence.
  virtual void extend(const std::vector<int32_t>& tokens) = 0;
  // Guesses at most `most` tokens after those that are known.
  virtual Draft propose(int32_t most) = 0;
};

// Places of a text where the same two tokens stand, newest first: hash chains, as data compressors
// keep them. 8 to 16 bytes a token.
class PairChains {
 public:
  static constexpr int32_t kNone = -1;

  // Adds the places of `tokens` that are new, each known by its second token.
  void follow(const std::vector<int32_t>& tokens);
  // The place before `place` whose pair may be the same: of another one with its hash, too.
  int32_t before(int64_t place) const { return before_[place]; }

 private:
  void append(const std::vector<int32_t>& tokens, int64_t place);

  std::vector<int32_t> newest_;  // by hash; as many as a power of two
  std::vector<int32_t> before_;  // by place
};

// Finds the earlier place where most of the newest tokens stand, the latest among equals, and
// copies what follows there.
class NgramDrafter : public Drafter {
 public:
  // How many of the newest tokens are compared.
  NgramDrafter(int32_t shortest, int32_t longest) : shortest_(shortest), longest_(longest) {}
  void extend(const std::vector<int32_t>& tokens) override;
  Draft propose(int32_t most) override;
  const std::vector<int32_t>& tokens() const { return tokens_; }

 private:
  // A text of few words has so many places to compare that looking would take as long as a step.
  static constexpr int64_t kMostCompared = 1 << 14;

  // The place whose tokens agree with the newest ones farthest back, and how many; 0 for none.
  std::pair<int64_t, int32_t> best_match() const;
  // How many tokens that end at `place` are the newest ones, at most `longest_`.
  int32_t agreeing(int64_t place) const;
  // The last place before `end` where `token` stands, -1 without one.
  int64_t last_place(int64_t end, int32_t token) const;

  int32_t shortest_, longest_;
  std::vector<int32_t> tokens_;
  PairChains chains_;
};

// Earlier answers, the newest about `most_tokens` tokens of them. They are indexed when somebody
// asks. An index cannot forget single answers, so two take turns: when the newer one is half full,
// the older one is dropped.
class AnswerIndex {
 public:
  explicit AnswerIndex(int64_t most_tokens) : half_(most_tokens / 2) {}
  void add(std::vector<int32_t> answer);
  // Indexes what was added since.
  void settle();
  SuffixDraft propose(const std::vector<int32_t>& context, int32_t most, float least_share);
  int64_t num_tokens();

  // After `settle`; the second number is another one for every content.
  const SuffixIndex& newer() const { return *new_; }
  const SuffixIndex& older() const { return *old_; }
  int64_t turns() const { return turns_; }

 private:
  int64_t half_;
  int64_t turns_ = 0;
  std::unique_ptr<SuffixIndex> old_ = std::make_unique<SuffixIndex>();
  std::unique_ptr<SuffixIndex> new_ = std::make_unique<SuffixIndex>();
  std::deque<std::vector<int32_t>> waiting_;
  int64_t num_waiting_ = 0;  // tokens
};

// Looks for the longest end of the sequence that occurred before, in it or in earlier answers. An
// index takes 150 bytes and up to half a microsecond a token: a sequence that is longer than
// `most_indexed` tokens is searched from its end instead, as NgramDrafter does.
class SuffixDrafter : public Drafter {
 public:
  // A guess ends where it would follow less than `least_share` of what was seen.
  SuffixDrafter(std::shared_ptr<AnswerIndex> answers, float least_share, int64_t most_indexed)
      : answers_(std::move(answers)), least_share_(least_share), most_indexed_(most_indexed) {}
  void extend(const std::vector<int32_t>& tokens) override;
  Draft propose(int32_t most) override;

 private:
  static constexpr int32_t kLongestContext = 64;

  // Where the sequence stands in an index of answers, as long as that does not change.
  struct Cursor {
    int64_t turn = -1;
    int64_t size = -1;
    int64_t read = 0;  // tokens of the sequence
    SuffixIndex::Place place;
  };
  SuffixDraft propose_in(const SuffixIndex& index, int64_t turn, Cursor& cursor, int32_t most);
  // What followed earlier in the sequence itself.
  SuffixDraft propose_own(int32_t most);
  int64_t count() const { return static_cast<int64_t>(text_.tokens().size()); }

  std::shared_ptr<AnswerIndex> answers_;
  float least_share_;
  int64_t most_indexed_;
  NgramDrafter text_{1, kLongestContext};
  std::unique_ptr<SuffixIndex> own_ = std::make_unique<SuffixIndex>();  // null where too long
  Cursor in_new_, in_old_;
};

// Lets each drafter read its new tokens and guess.
std::vector<Draft> propose_all(const std::vector<Drafter*>& drafters,
                               const std::vector<std::vector<int32_t>>& tokens, int32_t most);

// Guessed tokens of several sequences, the most useful first: the tokens that the first 0, 1, ...
// of them are expected to give, and the sequence of each.
using Ranking = std::pair<std::vector<double>, std::vector<int32_t>>;

// The i-th token of a guess is right with the i-th power of its sequence's rate. It is of the more
// use the less its sequence has run ahead of others: of half for every
// eight tokens. So those of one sequence come in their order.
//
// `lengths` are those of the guesses, `leads` say how many tokens each sequence is ahead; what is
// less likely than `least` is left out, and all but the first `most`.
Ranking rank_guesses(const std::vector<double>& rates, const std::vector<int32_t>& lengths,
                     const std::vector<double>& leads, double least, int64_t most);

}  // namespace fd::cpu

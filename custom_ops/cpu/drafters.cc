#include "drafters.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>

namespace fd::cpu {
namespace {

// Tokens that will probably be right; a longer match decides between equals.
std::pair<float, int32_t> worth(const SuffixDraft& draft) {
  return {std::accumulate(draft.shares.begin(), draft.shares.end(), 0.0f), draft.matched};
}

}  // namespace

void PairChains::follow(const std::vector<int32_t>& tokens) {
  if (tokens.size() > newest_.size()) {  // longer chains would be of pairs that are not the same
    size_t size = 64;
    while (size < 2 * tokens.size()) size *= 2;
    newest_.assign(size, kNone);
    before_.clear();
  }
  for (size_t place = before_.size(); place < tokens.size(); ++place) append(tokens, place);
}

void PairChains::append(const std::vector<int32_t>& tokens, int64_t place) {
  if (place == 0) {
    before_.push_back(kNone);
    return;
  }
  const uint64_t pair = static_cast<uint64_t>(static_cast<uint32_t>(tokens[place - 1])) << 32 |
                        static_cast<uint32_t>(tokens[place]);
  const uint64_t hash = (pair * 0x9E3779B97F4A7C15ull) >> 32;
  int32_t& newest = newest_[hash & (newest_.size() - 1)];
  before_.push_back(newest);
  newest = static_cast<int32_t>(place);
}

void NgramDrafter::extend(const std::vector<int32_t>& tokens) {
  tokens_.insert(tokens_.end(), tokens.begin(), tokens.end());
  chains_.follow(tokens_);
}

int32_t NgramDrafter::agreeing(int64_t place) const {
  const int64_t last = static_cast<int64_t>(tokens_.size()) - 1;
  int32_t same = 0;
  while (same < longest_ && same <= place && tokens_[place - same] == tokens_[last - same]) ++same;
  return same;
}

std::pair<int64_t, int32_t> NgramDrafter::best_match() const {
  const int64_t last = static_cast<int64_t>(tokens_.size()) - 1;
  if (last < 1) return {-1, 0};
  std::pair<int64_t, int32_t> best{-1, 0};
  int64_t compared = 0;
  for (int64_t at = chains_.before(last); at >= 0; at = chains_.before(at)) {
    const int32_t same = agreeing(at);
    if (same > best.second) best = {at, same};
    compared += same + 1;
    if (best.second == longest_ || compared > kMostCompared) break;
  }
  if (best.second < 2 && shortest_ == 1) {
    const int64_t at = last_place(last, tokens_[last]);
    if (at >= 0) best = {at, agreeing(at)};
  }
  return best;
}

int64_t NgramDrafter::last_place(int64_t end, int32_t token) const {
  constexpr int64_t kAtOnce = 32;  // a loop without exits, for vector instructions
  for (; end >= kAtOnce; end -= kAtOnce) {
    const int32_t* part = tokens_.data() + end - kAtOnce;
    int32_t found = 0;
    for (int64_t i = 0; i < kAtOnce; ++i) found |= static_cast<int32_t>(part[i] == token);
    if (found != 0) break;
  }
  int64_t place = end - 1;
  while (place >= 0 && tokens_[place] != token) --place;
  return place;
}

Draft NgramDrafter::propose(int32_t most) {
  const auto [best, matched] = best_match();
  if (matched < shortest_) return {};
  const int64_t count = static_cast<int64_t>(tokens_.size());
  std::vector<int32_t> copied;
  // Where the match runs into the end, what was copied so far goes on: a loop in the text.
  for (int64_t i = 0; i < most; ++i) {
    const int64_t from = best + 1 + i;
    copied.push_back(from < count ? tokens_[from] : copied[from - count]);
  }
  return {std::move(copied), matched};
}

void AnswerIndex::add(std::vector<int32_t> answer) {
  if (half_ == 0) return;
  if (static_cast<int64_t>(answer.size()) > half_) {
    answer.erase(answer.begin(), answer.end() - half_);
  }
  num_waiting_ += static_cast<int64_t>(answer.size());
  waiting_.push_back(std::move(answer));
  while (num_waiting_ > 2 * half_) {  // the indexes would not keep it either
    num_waiting_ -= static_cast<int64_t>(waiting_.front().size());
    waiting_.pop_front();
  }
}

void AnswerIndex::settle() {
  for (; !waiting_.empty(); waiting_.pop_front()) {
    const std::vector<int32_t>& answer = waiting_.front();
    if (new_->num_tokens() + static_cast<int64_t>(answer.size()) > half_) {
      old_ = std::exchange(new_, std::make_unique<SuffixIndex>());
      ++turns_;
    }
    new_->start_sequence();
    new_->extend(answer);
  }
  num_waiting_ = 0;
}

SuffixDraft AnswerIndex::propose(const std::vector<int32_t>& context, int32_t most,
                                 float least_share) {
  settle();
  SuffixDraft draft = new_->propose(context, most, least_share);
  SuffixDraft other = old_->propose(context, most, least_share);
  return worth(other) > worth(draft) ? other : draft;
}

int64_t AnswerIndex::num_tokens() {
  settle();
  return old_->num_tokens() + new_->num_tokens();
}

void SuffixDrafter::extend(const std::vector<int32_t>& tokens) {
  text_.extend(tokens);
  if (count() > most_indexed_) own_.reset();
  if (own_ != nullptr) own_->extend(tokens);
}

SuffixDraft SuffixDrafter::propose_own(int32_t most) {
  if (own_ != nullptr) return own_->propose_repeat(most, least_share_);
  Draft found = text_.propose(most);
  SuffixDraft draft;
  draft.shares.assign(found.first.size(), 1.0f);  // only the latest place was looked at
  draft.tokens = std::move(found.first);
  draft.matched = found.second;
  return draft;
}

SuffixDraft SuffixDrafter::propose_in(const SuffixIndex& index, int64_t turn, Cursor& cursor,
                                      int32_t most) {
  if (index.num_tokens() == 0) return {};
  const int64_t known = std::min<int64_t>(count(), kLongestContext);
  if (cursor.turn != turn || cursor.size != index.num_tokens() || count() - cursor.read > known) {
    cursor = {turn, index.num_tokens(), count() - known, {}};
  }
  for (; cursor.read < count(); ++cursor.read) {
    cursor.place = index.step(cursor.place, text_.tokens()[cursor.read]);
  }
  return index.propose_at(cursor.place, most, least_share_);
}

Draft SuffixDrafter::propose(int32_t most) {
  answers_->settle();
  SuffixDraft best = propose_own(most);
  const int64_t turn = answers_->turns();
  SuffixDraft drafts[] = {propose_in(answers_->newer(), turn, in_new_, most),
                          propose_in(answers_->older(), turn, in_old_, most)};
  for (SuffixDraft& draft : drafts) {
    if (worth(draft) > worth(best)) best = std::move(draft);
  }
  if (best.tokens.empty()) return {};
  return {std::move(best.tokens), best.matched};
}

std::vector<Draft> propose_all(const std::vector<Drafter*>& drafters,
                               const std::vector<std::vector<int32_t>>& tokens, int32_t most) {
  if (drafters.size() != tokens.size()) {
    throw std::invalid_argument("propose_all: as many lists of tokens as drafters are needed");
  }
  std::vector<Draft> drafts;
  for (size_t i = 0; i < drafters.size(); ++i) {
    drafters[i]->extend(tokens[i]);
    drafts.push_back(drafters[i]->propose(most));
  }
  return drafts;
}

Ranking rank_guesses(const std::vector<double>& rates, const std::vector<int32_t>& lengths,
                     const std::vector<double>& leads, double least, int64_t most) {
  if (rates.size() != lengths.size() || rates.size() != leads.size()) {
    throw std::invalid_argument("rank_guesses: as many lengths and leads as rates are needed");
  }
  constexpr double kHalved = 8.0;
  struct Guess {
    double use, chance;
    int32_t owner;
  };
  std::vector<Guess> ranked;
  for (size_t owner = 0; owner < rates.size(); ++owner) {
    double chance = rates[owner], lead = leads[owner];
    for (int32_t i = 0; i < lengths[owner] && chance >= least; ++i, chance *= rates[owner]) {
      ranked.push_back({chance * std::exp2(-lead / kHalved), chance, static_cast<int32_t>(owner)});
      lead += chance;
    }
  }
  std::stable_sort(ranked.begin(), ranked.end(),
                   [](const Guess& a, const Guess& b) { return a.use > b.use; });
  ranked.resize(std::min<size_t>(ranked.size(), std::max<int64_t>(most, 0)));
  Ranking found{{0.0}, {}};
  for (const Guess& guess : ranked) {
    found.first.push_back(found.first.back() + guess.chance);
    found.second.push_back(guess.owner);
  }
  return found;
}

}  // namespace fd::cpu

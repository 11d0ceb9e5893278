#include "drafters.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>

namespace fd::cpu {
namespace {

// Tokens that will probably be right; a longer match decides between equals.
std::pair<float, int32_t> worth(const SuffixDraft& draft) {
  return {std::accumulate(draft.shares.begin(), draft.shares.end(), 0.0f), draft.matched};
}

}  // namespace

void NgramDrafter::extend(const std::vector<int32_t>& tokens) {
  tokens_.insert(tokens_.end(), tokens.begin(), tokens.end());
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
  const int64_t count = static_cast<int64_t>(tokens_.size());
  int64_t best = -1, compared = 0;
  int32_t matched = 0;
  for (int64_t at = count - 1; at >= 0 && matched < longest_ && compared < kMostCompared;) {
    at = last_place(at, tokens_[count - 1]);
    if (at < 0) break;
    int32_t same = 1;
    while (same < longest_ && same <= at && tokens_[at - same] == tokens_[count - 1 - same]) ++same;
    compared += same;
    if (same > matched) matched = same, best = at;
  }
  if (matched < shortest_ || best < 0) return {};
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

}  // namespace fd::cpu

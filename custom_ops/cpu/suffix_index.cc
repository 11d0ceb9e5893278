#include "suffix_index.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <utility>

namespace fd::cpu {

void EdgeTable::place(uint64_t key, int32_t edge) {
  size_t i = home(key);
  while (slots_[i].edge != kNone) i = (i + 1) & (slots_.size() - 1);
  slots_[i] = {key, edge};
}

void EdgeTable::insert(uint64_t key, int32_t edge) {
  if (++count_ * 3 > slots_.size() * 2) {
    const std::vector<Slot> old = std::exchange(slots_, std::vector<Slot>(2 * slots_.size()));
    for (const Slot& slot : old) {
      if (slot.edge != kNone) place(slot.key, slot.edge);
    }
  }
  place(key, edge);
}

SuffixIndex::SuffixIndex() { add_state(0, kNone); }

int32_t SuffixIndex::next(int32_t state, int32_t token) const {
  const int32_t edge = edge_of_.find(key(state, token));
  return edge == kNone ? kNone : edges_[edge].target;
}

void SuffixIndex::connect(int32_t state, int32_t token, int32_t target) {
  const int32_t known = edge_of_.find(key(state, token));
  if (known != kNone) {
    edges_[known].target = target;
    return;
  }
  edge_of_.insert(key(state, token), static_cast<int32_t>(edges_.size()));
  edges_.push_back({token, target, states_[state].first_edge});
  states_[state].first_edge = static_cast<int32_t>(edges_.size()) - 1;
}

int32_t SuffixIndex::add_state(int32_t length, int32_t link) {
  states_.push_back({length, link, kNone, 0, 0});
  return static_cast<int32_t>(states_.size()) - 1;
}

int32_t SuffixIndex::split(int32_t from, int32_t token, int32_t target) {
  const int32_t copy = add_state(states_[from].length + 1, states_[target].link);
  states_[copy].count = states_[target].count;
  states_[copy].seen = states_[target].seen;
  for (int32_t e = states_[target].first_edge; e != kNone; e = edges_[e].next) {
    connect(copy, edges_[e].token, edges_[e].target);
  }
  states_[target].link = copy;
  for (int32_t s = from; s != kNone && next(s, token) == target; s = states_[s].link) {
    connect(s, token, copy);
  }
  return copy;
}

int32_t SuffixIndex::append(int32_t token) {
  const int32_t known = next(last_, token);
  if (known != kNone) {  // an earlier sequence went this way
    return states_[known].length == states_[last_].length + 1 ? known : split(last_, token, known);
  }
  const int32_t fresh = add_state(states_[last_].length + 1, kRoot);
  int32_t s = last_;
  for (; s != kNone && next(s, token) == kNone; s = states_[s].link) connect(s, token, fresh);
  if (s != kNone) {
    const int32_t target = next(s, token);
    const bool exact = states_[target].length == states_[s].length + 1;
    // Not in one expression: split() may move the states.
    const int32_t link = exact ? target : split(s, token, target);
    states_[fresh].link = link;
  }
  return fresh;
}

void SuffixIndex::extend(const std::vector<int32_t>& tokens) {
  constexpr int64_t kMostTokens = std::numeric_limits<int32_t>::max() / 4;
  if (num_tokens_ + static_cast<int64_t>(tokens.size()) > kMostTokens) {
    throw std::invalid_argument("suffix index: more than 2^29 tokens");
  }
  for (const int32_t token : tokens) {
    last_ = append(token);
    ++num_tokens_;
    int32_t s = last_;
    for (int i = 0; i < kCountedSubstrings && s > kRoot; ++i, s = states_[s].link) {
      ++states_[s].count;
      states_[s].seen = static_cast<int32_t>(num_tokens_);
    }
  }
}

SuffixDraft SuffixIndex::follow(int32_t state, int32_t matched, int32_t most,
                                float least_share) const {
  SuffixDraft draft;
  draft.matched = matched;
  float share = 1.0f;
  while (static_cast<int32_t>(draft.tokens.size()) < most) {
    int64_t total = 0;
    const Edge* best = nullptr;
    for (int32_t e = states_[state].first_edge; e != kNone; e = edges_[e].next) {
      const State& target = states_[edges_[e].target];
      total += target.count;
      if (best == nullptr || target.count > states_[best->target].count ||
          (target.count == states_[best->target].count &&
           target.seen > states_[best->target].seen)) {
        best = &edges_[e];
      }
    }
    if (best == nullptr) {
      // The end of a sequence: what ends in the same way went on elsewhere, a loop in itself.
      state = states_[state].link;
      if (state <= kRoot) break;
      continue;
    }
    share *= static_cast<float>(states_[best->target].count) / std::max<int64_t>(total, 1);
    if (share < least_share) break;
    draft.tokens.push_back(best->token);
    draft.shares.push_back(share);
    state = best->target;
  }
  return draft;
}

SuffixDraft SuffixIndex::propose_repeat(int32_t most, float least_share) const {
  const int32_t state = states_[last_].link;
  if (state <= kRoot) return {};
  return follow(state, states_[state].length, most, least_share);
}

SuffixIndex::Place SuffixIndex::step(Place place, int32_t token) const {
  int32_t target = next(place.state, token);
  while (target == kNone && place.state != kRoot) {
    place.state = states_[place.state].link;
    place.matched = states_[place.state].length;
    target = next(place.state, token);
  }
  return target == kNone ? place : Place{target, place.matched + 1};
}

SuffixDraft SuffixIndex::propose_at(Place place, int32_t most, float least_share) const {
  while (place.state != kRoot && states_[place.state].first_edge == kNone) {
    place.state = states_[place.state].link;
    place.matched = states_[place.state].length;
  }
  if (place.state == kRoot) return {};
  return follow(place.state, place.matched, most, least_share);
}

SuffixDraft SuffixIndex::propose(const std::vector<int32_t>& context, int32_t most,
                                 float least_share) const {
  Place place;
  for (const int32_t token : context) place = step(place, token);
  return propose_at(place, most, least_share);
}

int64_t SuffixIndex::nbytes() const {
  return static_cast<int64_t>(states_.capacity() * sizeof(State)) +
         static_cast<int64_t>(edges_.capacity() * sizeof(Edge)) + edge_of_.nbytes();
}

}  // namespace fd::cpu

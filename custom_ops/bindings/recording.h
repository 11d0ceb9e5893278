// Native calls that are kept to be made again without Python.
//
// A step of single tokens makes the same calls with the same addresses as the one before: all that
// differs lies in the tensors. What Python does between two calls takes as long as a small kernel,
// and several times that after a large one has thrown Python's own data out of the caches.
#pragma once

#include <cstddef>
#include <functional>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace fd {

class Recording {
 public:
  // The one that notes the calling thread's ops, null where none does.
  static Recording*& active();

  void add(std::function<void()> call) { calls_.push_back(std::move(call)); }
  // Makes all calls, in their order. Whatever one throws ends it.
  void operator()() const {
    for (const auto& call : calls_) call();
  }
  size_t size() const { return calls_.size(); }

 private:
  std::vector<std::function<void()>> calls_;
};

// A call of `op` that the active recording, if there is one, keeps with copies of its arguments:
// addresses, not what lies there.
template <typename... A>
auto recorded(void (*op)(A...)) {
  return [op](A... args) {
    op(args...);
    if (Recording* recording = Recording::active()) {
      recording->add(
          [op, kept = std::tuple<std::decay_t<A>...>(args...)] { std::apply(op, kept); });
    }
  };
}

}  // namespace fd

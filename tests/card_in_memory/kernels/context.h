// Stacks of fibers and the switch from one to another.
#pragma once

#include <cstddef>

namespace card {

/// Where a fiber that does not run goes on.
struct Context {
  void* place = nullptr;
};

/// A stack whose last page nobody may touch; the next one begins at other sets of the caches.
class Stack {
 public:
  Stack();
  ~Stack();
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;

  /// The context of a fiber that begins with `entry`, which never returns.
  Context begin(void (*entry)());

 private:
  char* memory_;
};

/// Leaves `from` and goes on with `to`.
void change(Context& from, const Context& to);

}  // namespace card

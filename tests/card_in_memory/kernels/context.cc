#include "context.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace card {
namespace {

constexpr size_t kPage = 4096, kBytes = 24 * kPage, kColours = 16;

}  // namespace

Stack::Stack() {
  memory_ = static_cast<char*>(
      mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (memory_ == MAP_FAILED) throw std::bad_alloc();
  mprotect(memory_, kPage, PROT_NONE);
}

Stack::~Stack() { munmap(memory_, kBytes); }

#ifdef __x86_64__

// What a function must keep stands on the stack that is left.
asm(R"(
.text
.type card_change, @function
card_change:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq (%rsi), %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
extern "C" void card_change(void** from, void* const* to) __attribute__((visibility("hidden")));

Context Stack::begin(void (*entry)()) {
  static unsigned made = 0;
  constexpr int kKept = 6;
  char* const top = memory_ + kBytes - made++ % kColours * 192 - 16;  // a function's own alignment
  void** place = reinterpret_cast<void**>(top);
  *place = reinterpret_cast<void*>(entry);
  for (int i = 0; i < kKept; ++i) *--place = nullptr;
  return {place};
}

void change(Context& from, const Context& to) { card_change(&from.place, &to.place); }

#else

Context Stack::begin(void (*entry)()) {
  auto* const made = reinterpret_cast<ucontext_t*>(memory_ + kPage);  // below what the stack takes
  getcontext(made);
  made->uc_stack.ss_sp = memory_ + 2 * kPage;
  made->uc_stack.ss_size = kBytes - 2 * kPage;
  made->uc_link = nullptr;
  makecontext(made, entry, 0);
  return {made};
}

void change(Context& from, const Context& to) {
  ucontext_t here;  // on the stack that is left
  from.place = &here;
  swapcontext(&here, static_cast<ucontext_t*>(to.place));
}

#endif

}  // namespace card

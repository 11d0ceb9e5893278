// Sleep until a word of memory changes. A wait may end early: look again.
#pragma once

#include <atomic>
#include <cstdint>

#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#include <thread>
#endif

namespace fd {

#ifdef __linux__
static_assert(sizeof(std::atomic<uint32_t>) == sizeof(uint32_t));

// Among threads of one process. Returns at once if the word is not `seen`.
inline void futex_wait(std::atomic<uint32_t>* word, uint32_t seen) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr,
          0);
}
inline void futex_wake(std::atomic<uint32_t>* word, int sleepers) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), FUTEX_WAKE_PRIVATE, sleepers, nullptr,
          nullptr, 0);
}
#else
inline void futex_wait(std::atomic<uint32_t>*, uint32_t) { std::this_thread::yield(); }
inline void futex_wake(std::atomic<uint32_t>*, int) {}
#endif

}  // namespace fd

#include "cpu_features.h"

#include <atomic>
#include <stdexcept>

#if defined(__x86_64__) || defined(_M_X64)
#include <cpuid.h>
#define FD_X86 1
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#include "environment.h"

namespace fd {
namespace {

constexpr Isa kAll[] = {Isa::kPlain, Isa::kAvx2, Isa::kAvxVnni, Isa::kAvx512, Isa::kAmx};

#ifdef FD_X86
struct Registers {
  unsigned a = 0, b = 0, c = 0, d = 0;
};

Registers cpuid(unsigned leaf, unsigned subleaf) {
  Registers r;
  __get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d);
  return r;
}

bool has(unsigned word, int bit) { return (word >> bit) & 1; }

// Register state that the operating system saves on a context switch (XCR0).
unsigned saved_state() {
  if (!has(cpuid(1, 0).c, 27)) return 0;  // OSXSAVE
  unsigned low = 0, high = 0;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

// Linux hands out the tile registers on request only, to the whole process: their 8 KiB make every
// signal frame larger. It refuses where an alternate signal stack is too small for that.
bool tiles_granted() {
#ifdef __linux__
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
#else
  return false;
#endif
}

bool processor_runs(Isa isa) {
  if (isa == Isa::kPlain) return true;
  const Registers basic = cpuid(1, 0), extended = cpuid(7, 0), more = cpuid(7, 1);
  const unsigned state = saved_state();
  const bool avx2 = (state & 0x6) == 0x6 && has(basic.c, 12) /* FMA */ &&
                    has(basic.c, 29) /* F16C */ && has(extended.b, 5) /* AVX2 */ &&
                    has(extended.b, 8) /* BMI2 */;
  if (isa == Isa::kAvx2) return avx2;
  if (isa == Isa::kAvxVnni) return avx2 && has(more.a, 4);
  const bool avx512 = avx2 && (state & 0xe6) == 0xe6 && has(extended.b, 16) /* F */ &&
                      has(extended.b, 17) /* DQ */ && has(extended.b, 30) /* BW */ &&
                      has(extended.b, 31) /* VL */ && has(extended.c, 1) /* VBMI */ &&
                      has(extended.c, 11) /* VNNI */;
  if (isa == Isa::kAvx512) return avx512;
  return avx512 && (state & 0x60000) == 0x60000 && has(extended.d, 24) /* AMX-TILE */ &&
         has(extended.d, 25) /* AMX-INT8 */ && tiles_granted();
}
#else
bool processor_runs(Isa isa) { return isa == Isa::kPlain; }
#endif

bool compiled(Isa isa) {
  switch (isa) {
    case Isa::kPlain:
      return true;
    case Isa::kAvx2:
#ifdef FD_HAVE_AVX2
      return true;
#else
      return false;
#endif
    case Isa::kAvxVnni:
#ifdef FD_HAVE_AVXVNNI
      return true;
#else
      return false;
#endif
    case Isa::kAvx512:
#ifdef FD_HAVE_AVX512
      return true;
#else
      return false;
#endif
    case Isa::kAmx:
#ifdef FD_HAVE_AMX
      return true;
#else
      return false;
#endif
  }
  return false;
}

std::string names(const std::vector<Isa>& isas) {
  std::string text;
  for (Isa isa : isas) text += (text.empty() ? "" : ", ") + std::string(isa_name(isa));
  return text;
}

Isa by_name(const std::string& name, const char* source) {
  const std::vector<Isa> usable = available_isas();
  for (Isa isa : usable) {
    if (name == isa_name(isa)) return isa;
  }
  throw std::invalid_argument(std::string(source) + " is '" + name +
                              "', this machine and build offer: " + names(usable));
}

constexpr int kUndecided = -1;
std::atomic<int> chosen{kUndecided};

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kPlain:
      return "plain";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvxVnni:
      return "avxvnni";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAmx:
      return "amx";
  }
  return "unknown";
}

std::vector<Isa> available_isas() {
  std::vector<Isa> usable;
  for (Isa isa : kAll) {
    if (compiled(isa) && processor_runs(isa)) usable.push_back(isa);
  }
  return usable;
}

Isa current_isa() {
  const int known = chosen.load(std::memory_order_relaxed);
  if (known != kUndecided) return static_cast<Isa>(known);
  const std::string wanted = environment_word("FD_LITE_CPU_ISA");
  const Isa isa = wanted.empty() ? available_isas().back() : by_name(wanted, "FD_LITE_CPU_ISA");
  chosen.store(static_cast<int>(isa), std::memory_order_relaxed);
  return isa;
}

void set_isa(const std::string& name) {
  chosen.store(static_cast<int>(by_name(name, "instruction set")), std::memory_order_relaxed);
}

}  // namespace fd

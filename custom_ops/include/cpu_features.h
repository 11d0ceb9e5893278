// Which instruction set the kernels use: chosen once from cpuid, overridable for tests.
#pragma once

#include <string>
#include <vector>

namespace fd {

// Ordered from the plainest to the richest; every later set may be assumed faster.
enum class Isa { kPlain = 0, kAvx2 = 1, kAvxVnni = 2, kAvx512 = 3, kAmx = 4 };
constexpr int kIsas = 5;

const char* isa_name(Isa isa);

// The sets that were compiled in and that this processor and operating system can run.
std::vector<Isa> available_isas();

// The set in use: FD_LITE_CPU_ISA (plain, avx2, avxvnni, avx512, amx) if set, else the richest one.
// Throws std::invalid_argument if the variable names an unknown or unavailable set.
Isa current_isa();

// Switches the set for all later calls; same errors as current_isa().
void set_isa(const std::string& name);

// Picks from a table with one entry per set. Sets that were not compiled hold nullptr and are never
// asked for, because available_isas() does not offer them.
template <typename Table>
const Table& pick(const Table* const (&tables)[kIsas]) {
  return *tables[static_cast<int>(current_isa())];
}

}  // namespace fd

// FD_DECLARE_KERNELS(Table, name) declares `const Table name` in the namespace of every compiled
// set and makes `name_tables`, the argument of fd::pick. Use it at namespace scope inside fd.
#ifdef FD_HAVE_AVX2
#define FD_DECLARE_AVX2(Table, name) \
  namespace avx2 {                   \
  extern const Table name;           \
  }
#define FD_ADDRESS_AVX2(name) &avx2::name
#else
#define FD_DECLARE_AVX2(Table, name)
#define FD_ADDRESS_AVX2(name) nullptr
#endif
#ifdef FD_HAVE_AVXVNNI
#define FD_DECLARE_AVXVNNI(Table, name) \
  namespace avxvnni {                   \
  extern const Table name;              \
  }
#define FD_ADDRESS_AVXVNNI(name) &avxvnni::name
#else
#define FD_DECLARE_AVXVNNI(Table, name)
#define FD_ADDRESS_AVXVNNI(name) nullptr
#endif
#ifdef FD_HAVE_AVX512
#define FD_DECLARE_AVX512(Table, name) \
  namespace avx512 {                   \
  extern const Table name;             \
  }
#define FD_ADDRESS_AVX512(name) &avx512::name
#else
#define FD_DECLARE_AVX512(Table, name)
#define FD_ADDRESS_AVX512(name) nullptr
#endif
#ifdef FD_HAVE_AMX
#define FD_DECLARE_AMX(Table, name) \
  namespace amx {                   \
  extern const Table name;          \
  }
#define FD_ADDRESS_AMX(name) &amx::name
#else
#define FD_DECLARE_AMX(Table, name)
#define FD_ADDRESS_AMX(name) nullptr
#endif
#define FD_DECLARE_KERNELS(Table, name)                                                  \
  namespace plain {                                                                      \
  extern const Table name;                                                               \
  }                                                                                      \
  FD_DECLARE_AVX2(Table, name)                                                           \
  FD_DECLARE_AVXVNNI(Table, name)                                                        \
  FD_DECLARE_AVX512(Table, name)                                                         \
  FD_DECLARE_AMX(Table, name)                                                            \
  static const Table* const name##_tables[kIsas] = {&plain::name, FD_ADDRESS_AVX2(name), \
                                                    FD_ADDRESS_AVXVNNI(name),            \
                                                    FD_ADDRESS_AVX512(name), FD_ADDRESS_AMX(name)}

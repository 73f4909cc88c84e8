#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"

#ifdef KBIT_X86
#include <cpuid.h>
#endif
#ifdef KBIT_ARM
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace kbit {

namespace portable {
extern const Kernels kKernels;
}
#ifdef KBIT_X86
namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}
#endif

namespace {

// What each source may use by its flags in compiler.py, not only what it uses in so many words: compilers use the rest.
#ifdef KBIT_X86
struct Cpuid {
  unsigned a = 0, b = 0, c = 0, d = 0;
  explicit Cpuid(unsigned leaf, unsigned subleaf = 0) { __get_cpuid_count(leaf, subleaf, &a, &b, &c, &d); }
};

// x86-64-v3. Not every compiler's __builtin_cpu_supports knows all of its parts; it does know whether the system saves the registers.
bool has_avx2() {
  constexpr unsigned kMovbe = 1u << 22, kF16c = 1u << 29, kLzcnt = 1u << 5;
  const unsigned first = Cpuid(1).c, extended = Cpuid(0x80000001).c;
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
         __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt") && (first & kMovbe) && (first & kF16c) &&
         (extended & kLzcnt);
}
bool has_avxvnni() {
  constexpr unsigned kAvxVnniBit = 1u << 4;
  return has_avx2() && (Cpuid(7, 1).a & kAvxVnniBit);
}
// x86-64-v4
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512vnni() {
  return has_avx512() && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") &&
         __builtin_cpu_supports("avx512vpopcntdq") && __builtin_cpu_supports("gfni");
}
#endif
#ifdef KBIT_ARM
// Armv8.2 with dot products.
bool has_neon() {
  constexpr unsigned long kNeeded = HWCAP_CRC32 | HWCAP_ATOMICS | HWCAP_ASIMDRDM | HWCAP_ASIMDDP;
  return (getauxval(AT_HWCAP) & kNeeded) == kNeeded;
}
#endif

std::atomic<const IsaEntry*> forced{nullptr};

// Of all, or of those that this machine runs, best first.
std::string names(bool usable) {
  std::string list;
  for (const IsaEntry& entry : isas()) {
    if (usable && !entry.usable) continue;
    if (!list.empty()) list += ", ";
    list += entry.isa->name;
  }
  return list;
}

const IsaEntry* find(const std::string& name) {
  for (const IsaEntry& entry : isas()) {
    if (entry.usable && name == entry.isa->name) return &entry;
  }
  return nullptr;
}

const IsaEntry& detect() {
  if (const char* wanted = std::getenv("KBIT_ISA"); wanted && *wanted) {
    if (const IsaEntry* found = find(wanted)) return *found;
    throw std::runtime_error(std::string("KBIT_ISA is '") + wanted + "', which this machine does not run; it runs " +
                             names(true) + " (of " + names(false) + ")");
  }
  for (const IsaEntry* entry = isas().begin();; ++entry) {
    if (entry->usable) return *entry;
  }
}

const IsaEntry& chosen() {
  if (const IsaEntry* entry = forced.load(std::memory_order_relaxed)) return *entry;
  static const IsaEntry& best = detect();
  return best;
}

}  // namespace

IsaEntries isas() {
  static const IsaEntry all[] = {
#ifdef KBIT_X86
      {&kAvx512Vnni, &avx512::kKernels, has_avx512vnni()},
      {&kAvx512, &avx512::kKernels, has_avx512()},
      {&kAvxVnni, &avx2::kKernels, has_avxvnni()},
      {&kAvx2, &avx2::kKernels, has_avx2()},
#endif
#ifdef KBIT_ARM
      {&kNeon, &portable::kKernels, has_neon()},
#endif
      {&kPortable, &portable::kKernels, true},
  };
  return {all, sizeof all / sizeof *all};
}

const Isa& isa() { return *chosen().isa; }
const Kernels& kernels() { return *chosen().kernels; }

bool force_isa(const char* name) {
  const IsaEntry* found = *name ? find(name) : nullptr;
  forced.store(found, std::memory_order_relaxed);
  return !*name || found;
}

}  // namespace kbit

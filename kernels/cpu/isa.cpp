#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace kbit {
namespace {

#ifdef KBIT_X86
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() { return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw"); }
bool has_avx512vnni() {
  return has_avx512() && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") &&
         __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("gfni") && __builtin_cpu_supports("avx512vpopcntdq");
}
#endif

std::atomic<const Isa*> forced{nullptr};

const Isa* find(const std::string& name) {
  for (int i = 0; i < isa_count(); ++i) {
    const IsaEntry entry = isa_entry(i);
    if (entry.usable && name == entry.isa->name) return entry.isa;
  }
  return nullptr;
}

const Isa& detect() {
  if (const char* wanted = std::getenv("KBIT_ISA"); wanted && *wanted) {
    if (const Isa* found = find(wanted)) return *found;
    throw std::runtime_error(std::string("KBIT_ISA is '") + wanted + "', which this machine does not run");
  }
  for (int i = 0;; ++i) {
    const IsaEntry entry = isa_entry(i);
    if (entry.usable) return *entry.isa;
  }
}

}  // namespace

int isa_count() {
#ifdef KBIT_X86
  return 4;
#else
  return 1;
#endif
}

IsaEntry isa_entry(int index) {
#ifdef KBIT_X86
  switch (index) {
    case 0: return {&kAvx512Vnni, has_avx512vnni()};
    case 1: return {&kAvx512, has_avx512()};
    case 2: return {&kAvx2, has_avx2()};
    default: break;
  }
#endif
  return {&kPortable, true};
}

const Isa& isa() {
  if (const Isa* chosen = forced.load(std::memory_order_relaxed)) return *chosen;
  static const Isa& best = detect();
  return best;
}

bool force_isa(const char* name) {
  const Isa* found = *name ? find(name) : nullptr;
  forced.store(found, std::memory_order_relaxed);
  return !*name || found;
}

}  // namespace kbit

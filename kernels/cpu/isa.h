// The instruction sets that the tiled kernels are compiled for.
#pragma once

#include "tiled.h"

#if defined(__x86_64__)
#define KBIT_X86
#elif defined(__aarch64__)
#define KBIT_ARM
#endif

namespace kbit {

extern const Isa kPortable;
#ifdef KBIT_X86
extern const Isa kAvx2, kAvxVnni, kAvx512, kAvx512Vnni;
#endif
#ifdef KBIT_ARM
extern const Isa kNeon;
#endif

// The best one that this machine runs, or the one that the environment variable KBIT_ISA names.
const Isa& isa();

// Their names, best first; `usable` says whether this machine runs it.
struct Kernels;
struct IsaEntry {
  const Isa* isa;
  const Kernels* kernels;  // of the greatest level (compiler.py) that it holds
  bool usable;
};
struct IsaEntries {
  const IsaEntry* first;
  int count;
  const IsaEntry* begin() const { return first; }
  const IsaEntry* end() const { return first + count; }
};
IsaEntries isas();

// For tests: use `name` from now on, until called with the empty name. False when the machine does not run it.
bool force_isa(const char* name);

}  // namespace kbit

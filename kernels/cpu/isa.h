// The instruction sets that the tiled kernels are compiled for.
#pragma once

#include "tiled.h"

#if defined(__x86_64__)
#define KBIT_X86
#endif

namespace kbit {

extern const Isa kPortable;
#ifdef KBIT_X86
extern const Isa kAvx2, kAvx512, kAvx512Vnni;
#endif

// The best one that this machine runs, or the one that the environment variable KBIT_ISA names.
const Isa& isa();

// Their names, best first; `usable` says whether this machine runs it.
struct IsaEntry {
  const Isa* isa;
  bool usable;
};
int isa_count();
IsaEntry isa_entry(int index);

// For tests: use `name` from now on, until called with the empty name. False when the machine does not run it.
bool force_isa(const char* name);

}  // namespace kbit

// Code that is compiled for several instruction sets lies in a namespace of each, so that the linker does not take one for another:
//
//   namespace kbit::inline KBIT_LEVEL { ... }
//
// compiler.py defines KBIT_LEVEL, and says for which a source is compiled. In sources that are compiled once it is `any`, where
// nothing is defined: they call such code through kernels() (kernels.h).
#pragma once

#ifndef KBIT_LEVEL
#define KBIT_LEVEL any
#endif

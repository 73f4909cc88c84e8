// Vectors of floats in the extensions of GCC and Clang: one source for every instruction set.
#pragma once

#include "level.h"

namespace kbit::inline KBIT_LEVEL {

#if defined(__AVX512F__)
inline constexpr int kLanes = 16;
#elif defined(__AVX__)
inline constexpr int kLanes = 8;
#else
inline constexpr int kLanes = 4;
#endif

template <int Lanes>
struct VectorOf {
  typedef float type __attribute__((vector_size(4 * Lanes)));
};
using Vector = VectorOf<kLanes>::type;

inline Vector load(const float* p) {
  typedef Vector Unaligned __attribute__((aligned(4), may_alias));
  return *reinterpret_cast<const Unaligned*>(p);
}

inline void store(float* p, Vector v) {
  typedef Vector Unaligned __attribute__((aligned(4), may_alias));
  *reinterpret_cast<Unaligned*>(p) = v;
}

}  // namespace kbit::inline KBIT_LEVEL

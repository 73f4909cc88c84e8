// Vectors of floats in the extensions of GCC and Clang: one source for every instruction set.
#pragma once

#include <cstring>

#include "level.h"

namespace kbit::inline KBIT_LEVEL {

#if defined(__AVX512F__)
inline constexpr int kLanes = 16;
#elif defined(__AVX__)
inline constexpr int kLanes = 8;
#else
inline constexpr int kLanes = 4;
#endif

template <int Lanes, class T = float>
struct VectorOf {
  typedef T type __attribute__((vector_size(sizeof(T) * Lanes)));
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

// Adds halves until `Left` lanes are left, which is several times faster than what compilers make of a loop over the lanes.
template <int Left, int Lanes, class T>
typename VectorOf<Left, T>::type fold(typename VectorOf<Lanes, T>::type v) {
  if constexpr (Lanes == Left) {
    return v;
  } else {
    typename VectorOf<Lanes / 2, T>::type half[2];
    std::memcpy(half, &v, sizeof v);
    return fold<Left, Lanes / 2, T>(half[0] + half[1]);
  }
}

}  // namespace kbit::inline KBIT_LEVEL

// The element types of activations.
#pragma once

#include <cstdint>

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#ifdef __F16C__
#include <immintrin.h>
#endif

namespace kbit {

enum class Dtype { Float32, BFloat16, Float16 };

// Calls `f` with a null pointer of the element type, so that a generic lambda can name it.
template <class F>
void with_type(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::Float32: return f(static_cast<float*>(nullptr));
    case Dtype::BFloat16: return f(static_cast<c10::BFloat16*>(nullptr));
    case Dtype::Float16: return f(static_cast<c10::Half*>(nullptr));
  }
}

template <class T>
inline float to_float(T value) {
  return static_cast<float>(value);
}

#ifdef __F16C__
template <>
inline float to_float(c10::Half value) {
  return _cvtsh_ss(value.x);  // one instruction; c10's own conversion is a dozen
}
#endif

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

}  // namespace kbit

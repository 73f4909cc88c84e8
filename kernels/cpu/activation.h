// Elementwise functions on 16 floats, for the epilogue: one source for every instruction set.
#pragma once

#include <cstdint>
#include <cstring>
#include <string_view>

#include "level.h"

namespace kbit {

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));

enum class Activation { None, Relu, Gelu, GeluTanh, Silu, Sigmoid, Tanh };

// False when `name` is none of "", relu, gelu, gelu_tanh, silu, sigmoid, tanh.
inline bool parse_activation(std::string_view name, Activation& found) {
  constexpr struct { std::string_view name; Activation activation; } known[] = {
      {"", Activation::None}, {"relu", Activation::Relu}, {"gelu", Activation::Gelu}, {"gelu_tanh", Activation::GeluTanh},
      {"silu", Activation::Silu}, {"sigmoid", Activation::Sigmoid}, {"tanh", Activation::Tanh}};
  for (const auto& each : known) {
    if (each.name == name) {
      found = each.activation;
      return true;
    }
  }
  return false;
}

inline namespace KBIT_LEVEL {

// exp by 2 ** n * p(r), |r| <= ln(2) / 2, as in Cephes; it saturates at the largest finite power instead of at infinity.
inline Floats exp(Floats x) {
  const Floats low = Floats{} - 87.3f, high = Floats{} + 88.3f;
  x = x < low ? low : x;
  x = x > high ? high : x;
  const Floats magic = Floats{} + 12582912.0f;  // adding and taking it away rounds to an integer
  const Floats n = (x * 1.44269504f + magic) - magic;
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats p = Floats{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Ints power = (__builtin_convertvector(n, Ints) + 127) << 23;
  Floats scale;
  std::memcpy(&scale, &power, sizeof scale);
  return p * scale;
}

inline Floats sigmoid(Floats x) { return 1.0f / (1.0f + exp(-x)); }

// erf as a rational function on [-4, 4], past which it is +-1 in float32: the coefficients of Eigen (generic_fast_erf_float).
inline Floats erf(Floats x) {
  const Floats four = Floats{} + 4.0f;
  x = x > four ? four : x;
  x = x < -four ? -four : x;
  const Floats s = x * x;
  Floats p = Floats{} - 2.72614225801306e-10f;
  p = p * s + 2.77068142495902e-08f;
  p = p * s - 2.10102402082508e-06f;
  p = p * s - 5.69250639462346e-05f;
  p = p * s - 7.34990630326855e-04f;
  p = p * s - 2.95459980854025e-03f;
  p = p * s - 1.60960333262415e-02f;
  Floats q = Floats{} - 1.45660718464996e-05f;
  q = q * s - 2.13374055278905e-04f;
  q = q * s - 1.68282697438203e-03f;
  q = q * s - 7.37332916720468e-03f;
  q = q * s - 1.42647390514189e-02f;
  return x * p / q;
}

// values[i] = function(values[i]) for i below `count`, a multiple of 16.
template <class Function>
void for_all(float* values, int64_t count, Function function) {
  for (int64_t i = 0; i < count; i += 16) {
    Floats v;
    std::memcpy(&v, values + i, sizeof v);
    v = function(v);
    std::memcpy(values + i, &v, sizeof v);
  }
}

// The activation of each of `count` values, a multiple of 16.
inline void apply(Activation activation, float* values, int64_t count) {
  switch (activation) {
    case Activation::None: return;
    case Activation::Relu: return for_all(values, count, [](Floats x) { return x < 0.0f ? Floats{} : x; });
    case Activation::Gelu: return for_all(values, count, [](Floats x) { return x * 0.5f * (1.0f + erf(x * 0.70710678f)); });
    case Activation::GeluTanh:
      return for_all(values, count, [](Floats x) { return x * sigmoid(x * 1.5957691216f * (1.0f + 0.044715f * x * x)); });
    case Activation::Silu: return for_all(values, count, [](Floats x) { return x * sigmoid(x); });
    case Activation::Sigmoid: return for_all(values, count, [](Floats x) { return sigmoid(x); });
    case Activation::Tanh: return for_all(values, count, [](Floats x) { return 2.0f * sigmoid(2.0f * x) - 1.0f; });
  }
}

}  // inline namespace KBIT_LEVEL

}  // namespace kbit

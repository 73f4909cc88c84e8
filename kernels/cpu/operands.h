// Operands of the operators, checked: what does not fit would be read out of bounds. Each raises a c10::Error that says what is wrong.
#pragma once

#include <cstdint>
#include <optional>

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include "dtype.h"
#include "tiled.h"

namespace kbit {

using OptionalTensor = std::optional<at::Tensor>;

inline constexpr int64_t kMaxSize = int64_t{1} << 31;  // of rows, columns and groups: below it

Dtype dtype_of(at::ScalarType type, const char* what);

// The operand in contiguous memory, once it is known to be what the kernel will read it as.
at::Tensor operand(const at::Tensor& tensor, const char* name, at::ScalarType type, at::IntArrayRef shape);

// The levels that the codes of a weight stand for, checked.
at::Tensor codebook_operand(const at::Tensor& codebook, int64_t bits);

// How many planes of a cascade this thread's operators read at most, 0 for all, from now on; returns what it was.
int set_precision(int bits);

// The packed weight in `packed`, which has to outlive it.
TiledWeight tiled_weight(const at::Tensor& packed);
// The same, of `nbytes` at `bytes`.
TiledWeight tiled_weight(const uint8_t* bytes, int64_t nbytes);

// What 16 bits mean depends on what the activations hold: float32 takes three digits, the others two.
int grid_bits(int64_t activation_bits, Dtype dtype);

}  // namespace kbit

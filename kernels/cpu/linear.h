// y = global_scale * x @ W.T + bias.
#pragma once

#include <cstdint>

#include "weight.h"

namespace kbit {

// Row length of the float32 copy of x that `linear` reads: K rounded up to whole blocks.
int64_t padded_columns(int64_t columns);

// x [batch, columns] of `dtype`, contiguous, to float32 [batch, padded_columns(columns)] with zeros in the padding.
void pad_activations(const void* x, Dtype dtype, int64_t batch, int64_t columns, float* padded);

// x [batch, padded_columns(K)] float32 as from `pad_activations`; bias [N] of `bias_dtype` or null; y [batch, N] of
// `dtype`, contiguous. Sums are float32 and rounded to `dtype` once.
void linear(const Weight& weight, const float* x, int64_t batch, const void* bias, Dtype bias_dtype, void* y,
            Dtype dtype);

}  // namespace kbit

// Rows of a packed table.
#pragma once

#include <cstdint>

#include "weight.h"

namespace kbit {

// out[i] = global_scale * W[indices[i]] for `count` indices, each below weight.rows (unchecked); out is [count, K] of
// `dtype`, contiguous.
void embedding(const Weight& weight, const int64_t* indices, int64_t count, void* out, Dtype dtype);

}  // namespace kbit

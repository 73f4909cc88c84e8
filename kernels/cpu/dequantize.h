// One row of a tiled weight in float32.
#pragma once

#include "tiled.h"

namespace kbit {

// out[K] = scale * level + offset, rounded once, without the global scale.
void dequantize_row(const TiledWeight& weight, int64_t row, float* out);

}  // namespace kbit

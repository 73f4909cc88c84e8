// Float weights to codes: the compiled form of kbit_inductor/quantizers.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "level.h"

namespace kbit {

struct GridSearch {
  int bits;  // 1..8
  int64_t group_size;
  bool symmetric;
  float global_scale;    // a power of two
  double lowest_shrink, highest_shrink;  // of the narrowest and the widest grid tried
  int candidates;  // grids tried, the full range among them; 0: the full range alone
  int refits;      // least-squares fits of the best of them
  const uint8_t* levels = nullptr;  // [2 ** bits] of a codebook, ascending; null where every code is its own level
  const float* importance = nullptr;  // [columns], positive: of each column's squared error; null where all count alike
};

struct QuantizedRows {
  uint8_t* codes;     // [rows, columns]
  c10::Half* scale;   // [rows, groups]
  c10::Half* offset;  // [rows, groups]; not written when the grid is symmetric
  double* errors;     // [rows, 2]: squared error, all columns alike, and squared norm, in units of global_scale; zero at the start
};

inline namespace KBIT_LEVEL {

// weight [rows, columns] of `dtype`, contiguous and finite.
void quantize(const void* weight, Dtype dtype, int64_t rows, int64_t columns, const GridSearch& search,
              const QuantizedRows& out);

}  // inline namespace KBIT_LEVEL

}  // namespace kbit

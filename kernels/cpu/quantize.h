// Float weights to codes: the compiled form of kbit_inductor/quantizers, and of pack_codes in ../layout.py.
#pragma once

#include <cstdint>

#include "weight.h"

namespace kbit {

struct GridSearch {
  int bits;  // 1..8
  int64_t group_size;
  bool symmetric;
  float global_scale;    // a power of two
  double lowest_shrink;  // of the narrowest grid tried
  int candidates;        // grids tried before the refit, the full range among them; 0: the full range, without a refit
};

struct QuantizedRows {
  uint8_t* codes;     // [rows, columns]
  c10::Half* scale;   // [rows, groups]
  c10::Half* offset;  // [rows, groups]; not written when the grid is symmetric
  double* errors;     // [rows, 2]: squared error and squared norm, in units of global_scale; zero at the start
};

// weight [rows, columns] of `dtype`, contiguous and finite.
void quantize(const void* weight, Dtype dtype, int64_t rows, int64_t columns, const GridSearch& search,
              const QuantizedRows& out);

// codes [rows, columns], each below 2 ** bits, to planes [bits, rows, ceil(columns / 8)].
void pack_codes(const uint8_t* codes, int64_t rows, int64_t columns, int bits, uint8_t* planes);

}  // namespace kbit

// Products with many packed weights, one for each run of rows: the experts of a mixture.
#pragma once

#include <cstdint>
#include <vector>

#include "activations.h"
#include "level.h"
#include "tiled.h"

namespace kbit {

// Rows `first` .. `first + rows` of x, which `weight` is multiplied by.
struct Run {
  int64_t first, rows;
  TiledWeight weight;
};

inline namespace KBIT_LEVEL {

// y[rows of a run] = x[rows of the run] @ W.T for all runs, each of one row at least; `x.rows` does not matter. All weights have the
// same rows and columns, y [rows of x, N] is of x's dtype and contiguous. All threads share the work of all runs.
void linear_of_runs(const ActivationSource& x, const std::vector<Run>& runs, int activation_bits, void* y);

}  // inline namespace KBIT_LEVEL

}  // namespace kbit

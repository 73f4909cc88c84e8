// What is compiled for several instruction sets and called from code that is not.
#pragma once

#include <vector>

#include "append.h"
#include "chain.h"
#include "quantize.h"
#include "runs.h"
#include "tiled_linear.h"

namespace kbit {

struct Kernels {
  void (*tiled_linear)(const TiledProblem& problem);
  void (*attention)(const AttentionProblem& problem);
  void (*append)(const AppendProblem& problem, int64_t begin, int64_t end);
  void (*run_chain)(const std::vector<ChainStep>& steps);
  void (*linear_of_runs)(const ActivationSource& x, const std::vector<Run>& runs, int activation_bits, void* y);
  void (*quantize)(const void* weight, Dtype dtype, int64_t rows, int64_t columns, const GridSearch& search,
                   const QuantizedRows& out);
};

// Those for the instruction set of isa().
const Kernels& kernels();

inline namespace KBIT_LEVEL {
extern const Kernels kKernels;
}

}  // namespace kbit

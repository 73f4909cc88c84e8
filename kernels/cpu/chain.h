// Products, attention and what it needs, of few rows, one after the other on the same threads.
#pragma once

#include <variant>
#include <vector>

#include "append.h"
#include "attention.h"
#include "level.h"
#include "tiled_linear.h"

namespace kbit {

using ChainStep = std::variant<TiledProblem, AttentionProblem, AppendProblem>;

inline namespace KBIT_LEVEL {

// Every step may read what earlier ones wrote.
void run_chain(const std::vector<ChainStep>& steps);

}  // inline namespace KBIT_LEVEL

}  // namespace kbit

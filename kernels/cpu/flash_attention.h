// Attention of many queries: a prompt, or an encoder.
#pragma once

#include "attention.h"

namespace kbit::inline KBIT_LEVEL {

// As attention(), for any number of queries.
void flash_attention(const AttentionProblem& problem);

}  // namespace kbit::inline KBIT_LEVEL

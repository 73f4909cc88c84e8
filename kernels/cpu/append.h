// New keys and values put into a cache, queries and keys turned by their positions: what attention needs first in a decoding step.
#pragma once

#include <cstdint>

#include "attention.h"
#include "dtype.h"
#include "level.h"

namespace kbit {

struct AppendProblem {
  // Heads side by side in rows of `stride` elements, one row for each new token of each sequence.
  struct Rows {
    const void* data;
    int64_t stride;
  };
  Rows query, key, value;
  // [B or 1, M, size], the angles of a head's columns; without them nothing is turned.
  const void *cos = nullptr, *sin = nullptr;
  int64_t cos_batch = 0, sin_batch = 0;  // elements from one sequence to the next
  void* out;                             // queries [B, M, H, size], contiguous
  void *keys, *values;                   // [B, H', M, size] and [B, H', M, value_size]: where the new ones go
  HeadStrides key_strides, value_strides;
  int64_t batch, queries, heads, key_heads, size, value_size;
  Dtype dtype;

  int64_t tasks() const { return batch * queries * (heads + 2 * key_heads); }
};

inline namespace KBIT_LEVEL {

// Tasks that any threads may compute, in any order: a head of a token each.
void append(const AppendProblem& problem, int64_t begin, int64_t end);

}  // inline namespace KBIT_LEVEL

}  // namespace kbit

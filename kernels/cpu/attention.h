// Attention of a few queries over a long cache: a decoding step.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace kbit {

// Element (b, h, i, d) of a tensor lies at b * batch + h * head + i * row + d, in elements.
struct HeadStrides {
  int64_t batch, head, row;
};

enum class MaskType { None, Bool, Like };  // Like: of the dtype of q, added to the scores

struct AttentionProblem {
  const void *q, *k, *v;  // [B, H, M, D], [B, H / group, L, D], [B, H / group, L, Dv]
  HeadStrides q_strides, k_strides, v_strides;
  int64_t batch, heads, queries, length, size, value_size, group;
  float scale;
  MaskType mask_type = MaskType::None;
  const void* mask = nullptr;  // [B, H, M, L] with strides of any size, 0 where it broadcasts
  HeadStrides mask_strides{};
  int64_t mask_column = 0;
  Dtype dtype;
  void* out;  // [B, H, M, Dv], contiguous
};

// out = softmax(scale * q @ k.T + mask) @ v, with sums in float32. A query that may look at nothing gives NaN, as in PyTorch's math.
void decode_attention(const AttentionProblem& problem);

}  // namespace kbit

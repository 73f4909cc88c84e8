// Attention: softmax(q @ k.T) @ v.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

#include "dtype.h"
#include "level.h"

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
  bool causal = false;  // query i looks at the keys 0 .. i alone
  Dtype dtype;
  void* out;  // [B, M, H, Dv], contiguous: the heads of a query together, as the product behind it reads them
};

// What a run of keys gives for one query.
struct AttentionPart {
  float largest = -std::numeric_limits<float>::infinity(), sum = 0;
};

inline namespace KBIT_LEVEL {

// out = softmax(scale * q @ k.T + mask) @ v, with sums in float32. A query that may look at nothing gives zeros, as in PyTorch.
void attention(const AttentionProblem& problem);

// The same of a few queries over a long cache, a decoding step, in tasks that any threads may compute, in any order: first all of the one kind, then all of the other.
class Attention {
 public:
  // For about `threads` threads. `problem` has to outlive this.
  Attention(const AttentionProblem& problem, int64_t threads);

  int64_t tasks() const { return pairs_ * runs_; }
  void compute(int64_t begin, int64_t end);
  int64_t rows() const { return problem_.batch * problem_.heads * problem_.queries; }  // of the result
  void combine(int64_t begin, int64_t end) const;

 private:
  const AttentionProblem& problem_;
  int64_t pairs_, runs_, run_length_;  // of a sequence and a key head; of keys
  std::vector<AttentionPart> parts_;   // [pairs][runs][queries that look at the pair]
  std::vector<float> values_;          // the same, [Dv] each
};

}  // inline namespace KBIT_LEVEL

}  // namespace kbit

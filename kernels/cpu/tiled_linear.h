// Products of activations and packed weights, with what comes before and after them.
#pragma once

#include <cstdint>
#include <vector>

#include "activation.h"
#include "activations.h"
#include "level.h"
#include "tiled.h"
#include "dtype.h"

namespace kbit {

// What is added to a product, in a dtype of its own.
struct Addend {
  const void* data = nullptr;  // or null
  Dtype dtype = Dtype::Float32;
};

struct TiledProblem {
  ActivationSource x;
  // Of the same columns and group size. Their results stand side by side, in this order; with `gated` there are two of the same
  // rows, and the result is activation(first) * second.
  std::vector<TiledWeight> weights;
  std::vector<Addend> biases;  // [N], one for each weight
  int activation_bits;       // 1..8, 16 or 24
  Activation activation = Activation::None;
  bool gated = false;
  Addend residual;       // of the shape of y, added last
  void* y = nullptr;     // [rows of x, all N] of `y_dtype`, contiguous
  Dtype y_dtype = Dtype::Float32;
};

inline namespace KBIT_LEVEL {

// y = residual + activation(norm(x) @ W.T + bias), or with the gate's product in place of the activation.
void tiled_linear(const TiledProblem& problem);

// The same in tasks that any threads may compute, in any order.
class TiledProduct {
 public:
  // Quantizes the activations. `problem` has to outlive this.
  explicit TiledProduct(const TiledProblem& problem);

  int64_t tasks() const { return row_blocks_ * chunks_; }
  int64_t grain() const;  // so many tasks are worth handing to another thread
  void compute(int64_t begin, int64_t end) const;

 private:
  void compute_in_float(int64_t row, int64_t begin, int64_t end) const;

  const TiledProblem& problem_;
  Activations x_;
  int64_t row_blocks_, chunks_;  // a chunk of x stays in the L2 cache while the weights stream past
};

// Where the row blocks of all weights lie one after the other; those of a gate and of what it gates go together.
int64_t row_blocks_of(const TiledProblem& problem);
// The first weight's bytes that row block `index` of them reads.
const uint8_t* row_block_of(const TiledProblem& problem, int64_t index);

}  // inline namespace KBIT_LEVEL

// out [count, K] of `dtype` = rows `indices` of the table, each below weight.rows (unchecked).
void tiled_embedding(const TiledWeight& weight, const int64_t* indices, int64_t count, void* out, Dtype dtype);

// out [end - begin, K] = rows begin .. end in float32, rounded once.
void tiled_dequantize(const TiledWeight& weight, int64_t begin, int64_t end, float* out);

// Codes [N, K] below 2 ** bits, scale and offset float16 [N, groups] to the row blocks at `blocks`, and back. No offset: null.
// A cascade takes scales and offsets [bits, N, groups], and gives back those of the planes that are read, with their codes.
void tile(const TiledLayout& layout, const uint8_t* codes, const uint16_t* scale, const uint16_t* offset, uint8_t* blocks);
void untile(const TiledWeight& weight, uint8_t* codes, uint16_t* scale, uint16_t* offset);

}  // namespace kbit

// Activations to the 8-bit digits that the tiled kernels multiply by.
//
// At 8 bits and fewer, a segment (at most 128 columns of one group) is rounded to multiples of its largest magnitude / 127
// (at b bits: 2 ** (b - 1) - 1; at 1 bit every value is plus or minus the mean magnitude).
// At more bits a value becomes 2 or 3 digits of 8 bits, base 256: a block floating point of 16 or 24 bits, whose scale is a
// power of two, so that integers and short fractions are exact. Every digit is a row of its own to the kernels, and the
// result is the sum of their rows.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "tiled.h"
#include "dtype.h"
#include "level.h"

namespace kbit {

// x [rows, K], as the kernels read it, and optionally the RMS norm in front of the quantization.
struct ActivationSource {
  const void* data;
  Dtype dtype;
  int64_t rows;
  const void* norm_weight = nullptr;  // [K] of `dtype`: x / sqrt(mean(x ** 2) + eps) * norm_weight; null: x itself
  float eps = 0;
};

inline namespace KBIT_LEVEL {

class Activations {
 public:
  // `layout` gives columns, group_size and what follows from them. `bits`: 1..8, or 16 and 24.
  // With `vectors` the codes are given as bit vectors too.
  Activations(const ActivationSource& source, const TiledLayout& layout, int bits, bool vectors = false);

  int digits() const { return digits_; }  // rows of the blocks that stand for one row of x
  int64_t rows() const { return rows_; }
  const std::vector<ActivationBlock>& blocks() const { return blocks_; }
  int64_t rows_per_block() const { return rows_per_block_; }  // of x
  // Makes the table of partial sums that `isa` looks up for weights of `layout`, and says whether it does so.
  bool fill_table(const Isa& isa, const TiledLayout& layout);
  // Rows of x with a value that is no number or too large: their codes are zeros, their result has to be computed in float.
  const std::vector<int64_t>& in_float() const { return in_float_; }
  // x in float32 after the norm, as it was before quantization; `values` holds K floats.
  static void row(const ActivationSource& source, int64_t columns, int64_t index, float* values);

 private:
  void quantize_block(const ActivationSource& source, const TiledLayout& layout, int64_t block, std::vector<int64_t>& bad);

  int bits_, digits_;
  int64_t rows_, rows_per_block_;
  std::unique_ptr<int8_t[]> codes_;
  std::unique_ptr<float[]> scale_, sum_;
  std::unique_ptr<int32_t[]> negative_sum_;
  std::unique_ptr<uint32_t[]> planes_;
  std::vector<ActivationBlock> blocks_;
  std::vector<int64_t> in_float_;
  std::unique_ptr<uint8_t[]> table_;
};

}  // inline namespace KBIT_LEVEL

}  // namespace kbit

// The loop of a product that counts bits, for any instruction set: as dot.h, whose integers it gives by other means.
#pragma once

#include "bit_vectors.h"
#include "dot.h"

namespace kbit {
namespace {

inline constexpr int64_t kSegmentColumns = kSegmentQuads * kQuad;
inline constexpr int kBitRows = 4;  // of x at a time: what is counted stays in registers

struct BitSegment {
  const uint8_t* words;  // [count][bits][16] uint32
  int64_t count;
  int bits;
  const Grid* grid;
};

// Some rows of a block of x in one segment.
struct BitActivations {
  const uint32_t* vectors;  // of the first row and word
  int64_t stride;           // from word to word
  int count;                // for each row and word
  const float* scale;
  const int32_t* base;  // what the counts are added to, or at one vector taken from, for sum (code - m) q
  const float* sum;     // null but in the first segment of a group

  uint32_t at(int64_t word, int row, int index) const { return vectors[word * stride + row * count + index]; }
};

// `Machine` has accumulate<Rows, Xor>(segment, activations, sums): sums[row of x][16] += scale * a * (base + counts) + centre * sum.
template <class Machine, int Rows = kBitRows>
inline void count_rows(int rows, const BitSegment& segment, const BitActivations& x, float* sums) {
  if constexpr (Rows > 0) {
    if (rows < Rows) return count_rows<Machine, Rows - 1>(rows, segment, x, sums);
    if (x.count == 1) return Machine::template accumulate<Rows, true>(segment, x, sums);
    Machine::template accumulate<Rows, false>(segment, x, sums);
  }
}

// With m = 2 ** (bits - 1), as in dot.h. All vectors of the codes have popcount(x) = (columns + sum q) / 2 at one of the activations.
inline int32_t base_of(const TiledWeight& weight, int64_t columns, bool is_xor, int32_t negative_sum) {
  const int32_t centred = negative_sum * (1 << (weight.bits - 1));
  return is_xor ? centred + ((1 << weight.bits) - 1) * ((static_cast<int32_t>(columns) - negative_sum) / 2) : centred;
}

// sums of one block of x and one segment, of `columns` columns, which begins at `word`; `sum` as in BitActivations.
template <class Machine>
void bit_block(const TiledWeight& weight, const BitSegment& segment, int64_t columns, int64_t word, const ActivationBlock& x,
               const float* scale, const int32_t* negative_sum, const float* sum, float* sums) {
  const int64_t stride = static_cast<int64_t>(x.rows) * x.plane_count;
  const uint32_t* vectors = x.planes + word * stride;
  for (int first = 0; first < x.rows; first += kBitRows) {
    const int rows = x.rows - first < kBitRows ? x.rows - first : kBitRows;
    int32_t base[kBitRows];
    for (int r = 0; r < rows; ++r) base[r] = base_of(weight, columns, x.plane_count == 1, negative_sum[first + r]);
    const BitActivations part{vectors + first * x.plane_count, stride, x.plane_count,
                              scale + first, base, sum ? sum + first : nullptr};
    count_rows<Machine>(rows, segment, part, sums + first * kTileRows);
  }
}

template <class Machine>
void bit_dot(const TiledWeight& weight, int64_t row_block, const ActivationBlock* blocks, int64_t count, float* sums) {
  int64_t rows = 0;
  for (int64_t b = 0; b < count; ++b) rows += blocks[b].rows;
  std::memset(sums, 0, rows * kTileRows * sizeof(float));
  const uint8_t* block = weight.block(row_block);
  int64_t index = 0, word = 0;
  for (int64_t group = 0; group < weight.groups; ++group) {
    const Grid grid(weight, block, group);
    const int64_t end = (group + 1) * weight.group_size < weight.columns ? (group + 1) * weight.group_size : weight.columns;
    for (int64_t begin = group * weight.group_size; begin < end; begin += kSegmentColumns, ++index) {
      const int64_t columns = end - begin < kSegmentColumns ? end - begin : kSegmentColumns;
      const BitSegment segment{block + weight.grid_bytes + word_offset(word, weight.bits, 0, 0), ceil_div(columns, kWordColumns),
                               weight.bits, &grid};
      float* out = sums;
      for (int64_t b = 0; b < count; ++b) {
        const ActivationBlock& x = blocks[b];
        const float* sum = begin == group * weight.group_size ? x.sum + group * x.rows : nullptr;
        bit_block<Machine>(weight, segment, columns, word, x, x.scale + index * x.rows, x.negative_sum + index * x.rows, sum, out);
        out += x.rows * kTileRows;
      }
      word += segment.count;
    }
  }
}

}  // namespace
}  // namespace kbit

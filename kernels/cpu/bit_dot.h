// The loop of a product that counts bits, for any instruction set: as dot.h, whose integers it gives by other means.
#pragma once

#include "bit_vectors.h"
#include "dot.h"

namespace kbit {
namespace {

inline constexpr int kSegmentWords = kSegmentQuads * kQuad / kWordColumns;
inline constexpr int kBitRows = 4;  // of x at a time: what is counted stays in registers

struct BitSegment {
  const uint8_t* words;  // [count][bits][16] uint32
  int64_t count;
  int bits;
};

// Some rows of a block of x in one segment.
struct BitActivations {
  const uint32_t* vectors;  // of the first row and word
  int64_t stride;           // from word to word
  int count;                // for each row and word

  uint32_t at(int64_t word, int row, int index) const { return vectors[word * stride + row * count + index]; }
};

using Totals = int32_t[kTileRows];

// `Machine` has count<Rows, Xor>(segment, activations, totals): totals[row of x][16] = sum of 2 ** p popcount(w_p ^ x) when Xor, else
// sum of s_i 2 ** (p + i) popcount(w_p & x_i).
template <class Machine, int Rows = kBitRows>
inline void count_rows(int rows, const BitSegment& segment, const BitActivations& x, Totals* totals) {
  if constexpr (Rows > 0) {
    if (rows < Rows) return count_rows<Machine, Rows - 1>(rows, segment, x, totals);
    if (x.count == 1) return Machine::template count<Rows, true>(segment, x, totals);
    Machine::template count<Rows, false>(segment, x, totals);
  }
}

// What is known of a segment but for the counts.
struct BitTerms {
  const Grid* grid;
  int64_t columns;
  int bits;

  void add(const Totals& totals, bool is_xor, float scale, int32_t negative_sum, const float* sum, float* sums) const {
    int32_t base = negative_sum * (1 << (bits - 1));
    if (is_xor) base += ((1 << bits) - 1) * ((static_cast<int32_t>(columns) - negative_sum) / 2);  // popcount(x) = (K + sum q) / 2
    const int32_t sign = is_xor ? -1 : 1;
    for (int row = 0; row < kTileRows; ++row) {
      sums[row] += grid->scale[row] * scale * static_cast<float>(base + sign * totals[row]);
    }
    if (!sum) return;
    for (int row = 0; row < kTileRows; ++row) sums[row] += grid->centre[row] * *sum;
  }
};

template <class Machine>
void bit_dot(const TiledWeight& weight, int64_t row_block, const ActivationBlock* blocks, int64_t count, float* sums) {
  alignas(64) Totals totals[kBitRows];
  int64_t rows = 0;
  for (int64_t b = 0; b < count; ++b) rows += blocks[b].rows;
  std::memset(sums, 0, rows * kTileRows * sizeof(float));
  const uint8_t* block = weight.block(row_block);
  int64_t segment_index = 0, word = 0;
  for (int64_t group = 0; group < weight.groups; ++group) {
    const Grid grid(weight, block, group);
    const int64_t words = weight.words_of(group);
    const int64_t first = group * weight.group_size, left = weight.columns - first;
    const int64_t columns = left < weight.group_size ? left : weight.group_size;
    for (int64_t begin = 0; begin < words; begin += kSegmentWords, ++segment_index) {
      const int64_t length = words - begin < kSegmentWords ? words - begin : kSegmentWords;
      const BitSegment segment{block + weight.grid_bytes + word_offset(word, weight.bits, 0, 0), length, weight.bits};
      const int64_t rest = columns - begin * kWordColumns, full = kSegmentWords * kWordColumns;
      const BitTerms terms{&grid, rest < full ? rest : full, weight.bits};
      float* out = sums;
      for (int64_t b = 0; b < count; ++b) {
        const ActivationBlock& x = blocks[b];
        const int64_t stride = static_cast<int64_t>(x.rows) * x.plane_count;
        for (int r = 0; r < x.rows; r += kBitRows) {
          const int some = x.rows - r < kBitRows ? x.rows - r : kBitRows;
          const BitActivations part{x.planes + word * stride + r * x.plane_count, stride, x.plane_count};
          count_rows<Machine>(some, segment, part, totals);
          for (int i = 0; i < some; ++i, out += kTileRows) {
            const int64_t place = segment_index * x.rows + r + i;
            terms.add(totals[i], x.plane_count == 1, x.scale[place], x.negative_sum[place],
                      begin ? nullptr : x.sum + group * x.rows + r + i, out);
          }
        }
      }
      word += length;
    }
  }
}

}  // namespace
}  // namespace kbit

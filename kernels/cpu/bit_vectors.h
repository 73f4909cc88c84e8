// Products that count bits: codes of k bits and activations of j bits as bit vectors, after XNOR-Net (Rastegari et al., 2016) and
// DoReFa-Net (Zhou et al., 2016).
//
// With w_p the vectors of the codes and x_i those of the activations, as two's complement:
//   sum code q  =  sum over p, i of  s_i 2 ** (p + i) popcount(w_p & x_i)        s_i = -1 for the sign bit, else 1
// At j = 1 the activations are +-1, bits that say which, and one vector is enough at any k; at k = 1 that is XNOR and popcount:
//   sum code q  =  sum over p of  2 ** p (popcount(x) - popcount(w_p ^ x))
#pragma once

#include "tiled.h"

namespace kbit {

void bit_dot_portable(const TiledWeight& weight, int64_t row_block, const ActivationBlock* blocks, int64_t count, float* sums);
void bit_dot_avx2(const TiledWeight& weight, int64_t row_block, const ActivationBlock* blocks, int64_t count, float* sums);
void bit_dot_avx512(const TiledWeight& weight, int64_t row_block, const ActivationBlock* blocks, int64_t count, float* sums);

// Vectors of the activations of `bits`, 1 to 8, or of one of their digits.
inline constexpr int vectors_of(int bits) { return bits <= 8 ? bits : 8; }

static inline int64_t word_offset(int64_t word, int bits, int plane, int64_t row) {
  return ((word * bits + plane) * kTileRows + row) * 4;
}

// Codes of `columns` columns of one row of a row block, from a word's first column on, into its words, which begin as zeros.
static inline void write_codes(const uint8_t* codes, int64_t columns, int bits, int64_t row, uint8_t* words) {
  for (int64_t c = 0; c < columns; ++c) {
    for (int plane = 0; plane < bits; ++plane) {
      uint8_t* place = words + word_offset(c / kWordColumns, bits, plane, row);
      uint32_t word;
      std::memcpy(&word, place, 4);
      word |= static_cast<uint32_t>(codes[c] >> (bits - 1 - plane) & 1) << c % kWordColumns;
      std::memcpy(place, &word, 4);
    }
  }
}

static inline void read_codes(const uint8_t* words, int64_t columns, int bits, int64_t row, uint8_t* codes) {
  for (int64_t first = 0; first < columns; first += kWordColumns) {
    const int64_t count = columns - first < kWordColumns ? columns - first : kWordColumns;
    std::memset(codes + first, 0, count);
    for (int plane = 0; plane < bits; ++plane) {
      uint32_t word;
      std::memcpy(&word, words + word_offset(first / kWordColumns, bits, plane, row), 4);
      for (int64_t c = 0; c < count; ++c) codes[first + c] = static_cast<uint8_t>(codes[first + c] << 1 | (word >> c & 1));
    }
  }
}

}  // namespace kbit

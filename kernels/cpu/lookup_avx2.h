// One row of x by looking up partial sums, for CPUs with vectors of 32 bytes: after T-MAC (Wei et al., 2024), but exact.
//
// The 4 activations of a quad have 16 partial sums, one for each subset. A byte of a word of the tile holds two nibbles, each the
// subset that one row takes of them at one bit of its codes: vpshufb looks up 32 of these at once, low and high bytes of the sums
// apart. So no code is ever put together from its bits, and a weight costs in proportion to them.
#pragma once

#include <immintrin.h>

#include "dot.h"

namespace kbit {
namespace {  // see dot.h

constexpr int64_t kTable = 32;  // bytes for a quad: the low bytes of its 16 sums, then the high ones

inline int64_t table_bytes(const TiledLayout& layout, int rows) {
  return rows == 1 && !layout.codebook ? layout.quads * kTable : 0;
}

inline void fill_table(const TiledLayout& layout, const ActivationBlock& x, uint8_t* table) {
  const __m256i subset = _mm256_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  __m256i takes[kQuad];
  for (int j = 0; j < kQuad; ++j) {
    const __m256i bit = _mm256_set1_epi16(static_cast<short>(1 << j));
    takes[j] = _mm256_cmpeq_epi16(_mm256_and_si256(subset, bit), bit);
  }
  for (int64_t quad = 0; quad < layout.quads; ++quad, table += kTable) {
    const int8_t* q = x.codes + quad * kQuad;
    __m256i sums = _mm256_and_si256(takes[0], _mm256_set1_epi16(q[0]));
    for (int j = 1; j < kQuad; ++j) sums = _mm256_add_epi16(sums, _mm256_and_si256(takes[j], _mm256_set1_epi16(q[j])));
    const __m256i low = _mm256_and_si256(sums, _mm256_set1_epi16(0xff)), high = _mm256_srli_epi16(sums, 8);
    const __m256i bytes = _mm256_packus_epi16(low, high);  // a lane has 8 low bytes and their 8 high ones
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(table), _mm256_permute4x64_epi64(bytes, 0xd8));
  }
}

inline __m256i both_lanes(const uint8_t* bytes) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
}

// The rows in the order in which the nibbles give them: 0 2 4 6, 1 3 5 7.
inline __m256 apart(__m256 rows) { return _mm256_permutevar8x32_ps(rows, _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7)); }
inline __m256 in_order(__m256 rows) { return _mm256_permutevar8x32_ps(rows, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)); }

inline __m256 halves(const uint8_t* bytes) {
  return apart(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes))));
}

// Sums of up to 32 quads, at most 32 * 4 * 128 in magnitude: they fit 16 bits. `sums[p]` is of bit p of the codes.
template <int Bits>
inline void look_up_quads(const uint8_t* words, const uint8_t* table, int64_t quads, __m256i (&sums)[8]) {
  const __m256i shift = _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4), nibble = _mm256_set1_epi8(15);
#pragma GCC unroll 8
  for (int p = 0; p < Bits; ++p) sums[p] = _mm256_setzero_si256();
  for (int64_t quad = 0; quad < quads; ++quad, words += 8 * Bits, table += kTable) {
    const __m256i low = both_lanes(table), high = both_lanes(table + 16);
#pragma GCC unroll 4
    for (int word = 0; word < Bits; word += 2) {
      const __m256i index = _mm256_and_si256(_mm256_srlv_epi32(both_lanes(words + 8 * word), shift), nibble);
      const __m256i l = _mm256_shuffle_epi8(low, index), h = _mm256_shuffle_epi8(high, index);
      const int p = Bits - 1 - word;
      sums[p] = _mm256_add_epi16(sums[p], _mm256_unpacklo_epi8(l, h));
      if (word + 1 < Bits) sums[p - 1] = _mm256_add_epi16(sums[p - 1], _mm256_unpackhi_epi8(l, h));
    }
  }
}

// Adds up the bits of the codes: of rows 0 to 7 to total[0], of rows 8 to 15 to total[1].
template <int Bits>
inline void add_bits(const __m256i (&sums)[8], __m256i (&total)[2]) {
#pragma GCC unroll 4
  for (int p = 0; p < Bits; p += 2) {
    const __m256i next = p + 1 < Bits ? sums[p + 1] : _mm256_setzero_si256();
    const __m256i weights = _mm256_set1_epi32((1 << p) | (2 << p << 16));
    total[0] = _mm256_add_epi32(total[0], _mm256_madd_epi16(_mm256_unpacklo_epi16(sums[p], next), weights));
    total[1] = _mm256_add_epi32(total[1], _mm256_madd_epi16(_mm256_unpackhi_epi16(sums[p], next), weights));
  }
}

template <int Bits>
void dot_lookup(const TiledWeight& weight, const uint8_t* block, const ActivationBlock& x, float* out) {
  const uint8_t* words = block + weight.grid_bytes;
  const uint8_t* table = x.table;
  const uint8_t* offsets = block + weight.groups * kTileRows * 2;
  __m256 y[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
  int64_t segment = 0;
  for (int64_t group = 0; group < weight.groups; ++group) {
    const __m256 scale[2] = {halves(block + group * 32), halves(block + group * 32 + 16)};
    for (int64_t left = weight.quads_of(group); left > 0; left -= kSegmentQuads, ++segment) {
      const int64_t quads = left < kSegmentQuads ? left : kSegmentQuads;
      __m256i sums[8], total[2];
      look_up_quads<Bits>(words, table, quads, sums);
      words += quads * 8 * Bits, table += quads * kTable;
      total[0] = total[1] = _mm256_set1_epi32(x.negative_sum[segment] * (1 << (Bits - 1)));
      add_bits<Bits>(sums, total);
      for (int half = 0; half < 2; ++half) {
        const __m256 step = _mm256_mul_ps(scale[half], _mm256_set1_ps(x.scale[segment]));
        y[half] = _mm256_fmadd_ps(step, _mm256_cvtepi32_ps(total[half]), y[half]);
      }
    }
    const __m256 sum = _mm256_set1_ps(x.sum[group]);
    for (int half = 0; half < 2; ++half) {
      if (!weight.symmetric) {
        const __m256 middle = _mm256_set1_ps(1 << (Bits - 1));
        const __m256 centre = _mm256_fmadd_ps(scale[half], middle, halves(offsets + group * 32 + 16 * half));
        y[half] = _mm256_fmadd_ps(centre, sum, y[half]);
      } else if (Bits == 1) {
        y[half] = _mm256_fmadd_ps(_mm256_mul_ps(scale[half], _mm256_set1_ps(0.5f)), sum, y[half]);
      }
    }
  }
  for (int half = 0; half < 2; ++half) _mm256_storeu_ps(out + 8 * half, in_order(y[half]));
}

inline void dot_lookup(const TiledWeight& weight, int64_t row_block, const ActivationBlock& x, float* sums) {
  const uint8_t* block = weight.block(row_block);
  switch (weight.bits) {
    case 1: return dot_lookup<1>(weight, block, x, sums);
    case 2: return dot_lookup<2>(weight, block, x, sums);
    case 3: return dot_lookup<3>(weight, block, x, sums);
    case 4: return dot_lookup<4>(weight, block, x, sums);
    case 5: return dot_lookup<5>(weight, block, x, sums);
    case 6: return dot_lookup<6>(weight, block, x, sums);
    case 7: return dot_lookup<7>(weight, block, x, sums);
    default: return dot_lookup<8>(weight, block, x, sums);
  }
}

// A DotKernel.
template <class Machine>
void dot_or_look_up(const TiledWeight& weight, int64_t row_block, const ActivationBlock* blocks, int64_t count, float* sums) {
  if (count == 1 && blocks->table && !weight.levels) return dot_lookup(weight, row_block, *blocks, sums);
  dot<Machine>(weight, row_block, blocks, count, sums);
}

}  // namespace
}  // namespace kbit

// AVX-512 with VPOPCNTDQ (Ice Lake, Zen 4 and later): vpopcntd counts 32 columns of 16 rows at once.
#include "bit_vectors.h"

#if defined(__AVX512F__) && defined(__AVX512VPOPCNTDQ__)

#include <immintrin.h>

#include "bit_dot.h"
#include "dot_avx512.h"

namespace kbit {
namespace {

struct Avx512 {
  template <bool Xor, int Words>
  static __m512i count_words(const __m512i (&w)[Words], const BitActivations& x, int b, int i) {
    __m512i total = _mm512_setzero_si512();
#pragma GCC unroll 4
    for (int word = 0; word < Words; ++word) {
      const __m512i v = _mm512_set1_epi32(static_cast<int>(x.at(word, b, i)));
      const __m512i bits = _mm512_popcnt_epi32(Xor ? _mm512_xor_si512(w[word], v) : _mm512_and_si512(w[word], v));
      total = word ? _mm512_add_epi32(total, bits) : bits;
    }
    return total;
  }

  // The most significant bits come first on the side of the weight and last on that of the activations; Horner's rule on both.
  template <int Rows, bool Xor, int Words>
  static void accumulate_words(const BitSegment& segment, const BitActivations& x, float* sums) {
    __m512i totals[Rows];
#pragma GCC unroll 4
    for (int b = 0; b < Rows; ++b) totals[b] = _mm512_setzero_si512();
    for (int plane = 0; plane < segment.bits; ++plane) {
      __m512i w[Words];
#pragma GCC unroll 4
      for (int word = 0; word < Words; ++word) {
        w[word] = _mm512_loadu_si512(segment.words + word_offset(word, segment.bits, plane, 0));
      }
#pragma GCC unroll 4
      for (int b = 0; b < Rows; ++b) {
        __m512i total = count_words<Xor, Words>(w, x, b, x.count - 1);
        if constexpr (!Xor) {
          total = _mm512_sub_epi32(_mm512_setzero_si512(), total);
          for (int i = x.count - 2; i >= 0; --i) {
            total = _mm512_add_epi32(_mm512_add_epi32(total, total), count_words<Xor, Words>(w, x, b, i));
          }
        }
        totals[b] = _mm512_add_epi32(_mm512_add_epi32(totals[b], totals[b]), total);
      }
    }
#pragma GCC unroll 4
    for (int b = 0; b < Rows; ++b) {
      const __m512i base = _mm512_set1_epi32(x.base[b]);
      totals[b] = Xor ? _mm512_sub_epi32(base, totals[b]) : _mm512_add_epi32(base, totals[b]);
    }
    add_totals(totals, segment.grid->scale, segment.grid->centre, x, sums);
  }

  template <int Rows, bool Xor>
  static void accumulate(const BitSegment& segment, const BitActivations& x, float* sums) {
    switch (segment.count) {
      case 1: return accumulate_words<Rows, Xor, 1>(segment, x, sums);
      case 2: return accumulate_words<Rows, Xor, 2>(segment, x, sums);
      case 3: return accumulate_words<Rows, Xor, 3>(segment, x, sums);
      default: return accumulate_words<Rows, Xor, 4>(segment, x, sums);
    }
  }
};

}  // namespace

void bit_dot_avx512(const TiledWeight& weight, int64_t row_block, const ActivationBlock* blocks, int64_t count, float* sums) {
  bit_dot<Avx512>(weight, row_block, blocks, count, sums);
}

}  // namespace kbit

#endif

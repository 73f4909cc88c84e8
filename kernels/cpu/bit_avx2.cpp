// AVX2: the bits of a nibble are looked up by vpshufb (Muła, Kurz and Lemire, 2018), 8 rows at a time.
#include "bit_vectors.h"

#if defined(__AVX2__) && defined(__FMA__)

#include <immintrin.h>

#include "bit_dot.h"

namespace kbit {
namespace {

struct Avx2 {
  // Bits of every byte.
  static __m256i popcount(__m256i v) {
    const __m256i counts = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4, 0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3,
                                            3, 4);
    const __m256i nibble = _mm256_set1_epi8(15);
    const __m256i low = _mm256_shuffle_epi8(counts, _mm256_and_si256(v, nibble));
    return _mm256_add_epi8(low, _mm256_shuffle_epi8(counts, _mm256_and_si256(_mm256_srli_epi16(v, 4), nibble)));
  }

  // Of all words of a segment, in pairs of bytes: at most 64.
  template <bool Xor, int Words>
  static __m256i count_words(const __m256i (&w)[Words], const BitActivations& x, int b, int i) {
    __m256i bytes = _mm256_setzero_si256();
#pragma GCC unroll 4
    for (int word = 0; word < Words; ++word) {
      const __m256i v = _mm256_set1_epi32(static_cast<int>(x.at(word, b, i)));
      bytes = _mm256_add_epi8(bytes, popcount(Xor ? _mm256_xor_si256(w[word], v) : _mm256_and_si256(w[word], v)));
    }
    return _mm256_maddubs_epi16(bytes, _mm256_set1_epi8(1));
  }

  // The most significant bits come first on the side of the weight and last on that of the activations; Horner's rule on both.
  template <int Rows, bool Xor, int Words>
  static void accumulate_half(const BitSegment& segment, const BitActivations& x, int half, float* sums) {
    __m256i totals[Rows];
#pragma GCC unroll 4
    for (int b = 0; b < Rows; ++b) totals[b] = _mm256_setzero_si256();
    for (int plane = 0; plane < segment.bits; ++plane) {
      __m256i w[Words];
#pragma GCC unroll 4
      for (int word = 0; word < Words; ++word) {
        w[word] = _mm256_loadu_si256(
            reinterpret_cast<const __m256i*>(segment.words + word_offset(word, segment.bits, plane, 8 * half)));
      }
#pragma GCC unroll 4
      for (int b = 0; b < Rows; ++b) {
        __m256i pairs = count_words<Xor, Words>(w, x, b, x.count - 1);
        if constexpr (!Xor) {
          pairs = _mm256_sub_epi16(_mm256_setzero_si256(), pairs);
          for (int i = x.count - 2; i >= 0; --i) {
            pairs = _mm256_add_epi16(_mm256_add_epi16(pairs, pairs), count_words<Xor, Words>(w, x, b, i));
          }
        }
        totals[b] = _mm256_add_epi32(_mm256_add_epi32(totals[b], totals[b]), _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
      }
    }
    const __m256 scale = _mm256_load_ps(segment.grid->scale + 8 * half), centre = _mm256_load_ps(segment.grid->centre + 8 * half);
#pragma GCC unroll 4
    for (int b = 0; b < Rows; ++b) {
      const __m256i base = _mm256_set1_epi32(x.base[b]);
      const __m256i total = Xor ? _mm256_sub_epi32(base, totals[b]) : _mm256_add_epi32(base, totals[b]);
      float* out = sums + b * kTileRows + 8 * half;
      __m256 sum = _mm256_loadu_ps(out);
      sum = _mm256_fmadd_ps(_mm256_mul_ps(scale, _mm256_set1_ps(x.scale[b])), _mm256_cvtepi32_ps(total), sum);
      if (x.sum) sum = _mm256_fmadd_ps(centre, _mm256_set1_ps(x.sum[b]), sum);
      _mm256_storeu_ps(out, sum);
    }
  }

  template <int Rows, bool Xor>
  static void accumulate(const BitSegment& segment, const BitActivations& x, float* sums) {
    for (int half = 0; half < 2; ++half) {
      switch (segment.count) {
        case 1: accumulate_half<Rows, Xor, 1>(segment, x, half, sums); break;
        case 2: accumulate_half<Rows, Xor, 2>(segment, x, half, sums); break;
        case 3: accumulate_half<Rows, Xor, 3>(segment, x, half, sums); break;
        default: accumulate_half<Rows, Xor, 4>(segment, x, half, sums); break;
      }
    }
  }
};

}  // namespace

void bit_dot_avx2(const TiledWeight& weight, int64_t row_block, const ActivationBlock* blocks, int64_t count, float* sums) {
  bit_dot<Avx2>(weight, row_block, blocks, count, sums);
}

}  // namespace kbit

#endif

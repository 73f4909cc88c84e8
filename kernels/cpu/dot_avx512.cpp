// AVX-512 without VNNI (Skylake-X): a word of the tile is a byte mask, and products go through 16-bit pairs.
#include "isa.h"

#if defined(__AVX512BW__) && defined(__AVX512F__)

#include <immintrin.h>

#include "bit_vectors.h"
#include "dot_avx512.h"

namespace kbit {
namespace {

struct Avx512 {
  static void unpack(const uint8_t* words, int bits, const uint8_t* levels, int64_t quads, uint8_t* out) {
    for (int64_t quad = 0; quad < quads; ++quad, words += 8 * bits) {
      __m512i sum = _mm512_setzero_si512();
      for (int plane = 0; plane < bits; ++plane) {
        uint64_t mask;
        std::memcpy(&mask, words + 8 * plane, sizeof mask);
        sum = _mm512_mask_add_epi8(sum, mask, sum, _mm512_set1_epi8(static_cast<char>(1 << (bits - 1 - plane))));
      }
      _mm512_storeu_si512(out + quad * kCodesPerQuad, sum);
    }
    if (levels) look_up(levels, bits, quads * kCodesPerQuad, out);
  }

  // Codes to levels, 16 of the codebook at a time: vpshufb takes the low four bits of a code, the high ones say whether it applies.
  [[gnu::noinline]] static void look_up(const uint8_t* levels, int bits, int64_t count, uint8_t* codes) {
    for (int64_t i = 0; i < count; i += 64) {
      const __m512i code = _mm512_loadu_si512(codes + i);
      const __m512i part = _mm512_and_si512(_mm512_srli_epi16(code, 4), _mm512_set1_epi8(15));
      __m512i found = _mm512_setzero_si512();
      for (int first = 0; first < 1 << bits; first += 16) {
        const __m512i table = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(levels + first)));
        const __mmask64 here = _mm512_cmpeq_epi8_mask(part, _mm512_set1_epi8(static_cast<char>(first >> 4)));
        found = _mm512_mask_shuffle_epi8(found, here, table, code);
      }
      _mm512_storeu_si512(codes + i, found);
    }
  }

  template <int Rows>
  static void accumulate(const Segment& segment, const ActivationSegment& x, float* sums) {
    __m512i totals[Rows];
#pragma GCC unroll 16
    for (int b = 0; b < Rows; ++b) totals[b] = _mm512_set1_epi32(x.negative_sum[b] * (1 << segment.shift));
    const int8_t* q = x.codes;
    for (int64_t quad = 0; quad < segment.quads; ++quad, q += Rows * kQuad) {
      const __m512i w = _mm512_load_si512(segment.levels + quad * kCodesPerQuad);
      const __m512i even = _mm512_and_si512(w, _mm512_set1_epi16(0xff)), odd = _mm512_srli_epi16(w, 8);
#pragma GCC unroll 16
      for (int b = 0; b < Rows; ++b) {
        int four;
        std::memcpy(&four, q + b * kQuad, sizeof four);
        const __m512i v = _mm512_set1_epi32(four);
        const __m512i low = _mm512_madd_epi16(even, _mm512_srai_epi16(_mm512_slli_epi16(v, 8), 8));
        const __m512i high = _mm512_madd_epi16(odd, _mm512_srai_epi16(v, 8));
        totals[b] = _mm512_add_epi32(totals[b], _mm512_add_epi32(low, high));
      }
    }
    add_totals(totals, segment.grid->scale, segment.grid->centre, x, sums);
  }
};

}  // namespace

const Isa kAvx512{"avx512", dot<Avx512>, bit_dot_avx2, Avx512::unpack};

}  // namespace kbit

#endif

// AVX2 (Haswell, Zen and later). There is no product of 8-bit numbers that adds up in 32 bits, so sums are kept in 16 bits for as
// many quads as surely fit.
#include "isa.h"

#if defined(__AVX2__) && defined(__FMA__)

#include "bit_vectors.h"
#include "dot_avx2.h"
#include "lookup_avx2.h"

namespace kbit {
namespace {

// Levels of 7 bits or less: vpmaddubsw adds pairs of products up in 16 bits. The sums of `Quads` quads fit too, as
// Quads * 2 * 128 * level < 2 ** 15. With few quads, the levels of all of them stay in registers for all rows of x.
template <int Quads>
struct FewQuads {
  static constexpr int kRows = 4;

  template <int Rows>
  static void add(const Segment& segment, const int8_t* q, int64_t stride, __m256i (&totals)[Rows][2]) {
    int64_t quad = 0;
    for (; quad + Quads <= segment.quads; quad += Quads) add_quads<Quads>(segment, quad, q, stride, totals);
    if constexpr (Quads > 1) {
      for (; quad < segment.quads; ++quad) add_quads<1>(segment, quad, q, stride, totals);
    }
  }

  template <int Count, int Rows>
  static void add_quads(const Segment& segment, int64_t quad, const int8_t* q, int64_t stride, __m256i (&totals)[Rows][2]) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      __m256i levels[Count];
#pragma GCC unroll 4
      for (int i = 0; i < Count; ++i) levels[i] = load_levels(segment.levels + (quad + i) * kCodesPerQuad + 32 * half);
#pragma GCC unroll 4
      for (int b = 0; b < Rows; ++b) {
        const int8_t* four = q + quad * stride + b * kQuad;
        __m256i part = _mm256_maddubs_epi16(levels[0], broadcast_quad(four));
#pragma GCC unroll 4
        for (int i = 1; i < Count; ++i) {
          part = _mm256_add_epi16(part, _mm256_maddubs_epi16(levels[i], broadcast_quad(four + i * stride)));
        }
        totals[b][half] = _mm256_add_epi32(totals[b][half], _mm256_madd_epi16(part, _mm256_set1_epi16(1)));
      }
    }
  }
};

// With many, the 16-bit sums of all rows of x do.
template <int Quads>
struct ManyQuads {
  static constexpr int kRows = 4;

  template <int Rows>
  static void add(const Segment& segment, const int8_t* q, int64_t stride, __m256i (&totals)[Rows][2]) {
    for (int64_t begin = 0; begin < segment.quads; begin += Quads) {
      const int64_t end = begin + Quads < segment.quads ? begin + Quads : segment.quads;
      __m256i parts[Rows][2] = {};
      for (int64_t quad = begin; quad < end; ++quad) {
        const uint8_t* levels = segment.levels + quad * kCodesPerQuad;
        const __m256i low = load_levels(levels), high = load_levels(levels + 32);
#pragma GCC unroll 4
        for (int b = 0; b < Rows; ++b) {
          const __m256i four = broadcast_quad(q + quad * stride + b * kQuad);
          parts[b][0] = _mm256_add_epi16(parts[b][0], _mm256_maddubs_epi16(low, four));
          parts[b][1] = _mm256_add_epi16(parts[b][1], _mm256_maddubs_epi16(high, four));
        }
      }
#pragma GCC unroll 4
      for (int b = 0; b < Rows; ++b) {
        for (int half = 0; half < 2; ++half) {
          totals[b][half] = _mm256_add_epi32(totals[b][half], _mm256_madd_epi16(parts[b][half], _mm256_set1_epi16(1)));
        }
      }
    }
  }
};

// Levels of 8 bits: as numbers of 16 bits, those in even bytes and those in odd ones apart.
struct Wide {
  static constexpr int kRows = 2;

  template <int Rows>
  static void add(const Segment& segment, const int8_t* q, int64_t stride, __m256i (&totals)[Rows][2]) {
    for (int64_t quad = 0; quad < segment.quads; ++quad) {
      __m256i even[2], odd[2];
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const __m256i levels = load_levels(segment.levels + quad * kCodesPerQuad + 32 * half);
        even[half] = _mm256_and_si256(levels, _mm256_set1_epi16(0xff));
        odd[half] = _mm256_srli_epi16(levels, 8);
      }
#pragma GCC unroll 2
      for (int b = 0; b < Rows; ++b) {
        const __m256i four = broadcast_quad(q + quad * stride + b * kQuad);
        const __m256i low = _mm256_srai_epi16(_mm256_slli_epi16(four, 8), 8), high = _mm256_srai_epi16(four, 8);
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          const __m256i sum = _mm256_add_epi32(_mm256_madd_epi16(even[half], low), _mm256_madd_epi16(odd[half], high));
          totals[b][half] = _mm256_add_epi32(totals[b][half], sum);
        }
      }
    }
  }
};

void add(const Segment& segment, const ActivationSegment& x, int rows, float* sums) {
  switch (segment.shift + 1) {
    case 1:
    case 2: return add_all_rows<ManyQuads<32>>(segment, x, rows, sums);
    case 3: return add_all_rows<ManyQuads<16>>(segment, x, rows, sums);
    case 4: return add_all_rows<ManyQuads<8>>(segment, x, rows, sums);
    case 5: return add_all_rows<FewQuads<4>>(segment, x, rows, sums);
    case 6: return add_all_rows<FewQuads<2>>(segment, x, rows, sums);
    case 7: return add_all_rows<FewQuads<1>>(segment, x, rows, sums);
    default: return add_all_rows<Wide>(segment, x, rows, sums);
  }
}

using Avx2 = Avx2Dot<add>;

}  // namespace

const Isa kAvx2{"avx2", dot_or_look_up<Avx2>, bit_dot_avx2, Avx2::unpack, table_bytes, fill_table};

}  // namespace kbit

#endif

// AVX2 (Haswell, Zen and later): as dot_avx512.cpp, in halves of 8 rows.
#include "isa.h"

#if defined(__AVX2__) && defined(__FMA__)

#include <immintrin.h>

#include "bit_vectors.h"
#include "dot.h"

namespace kbit {
namespace {

struct Avx2 {
  // 32 bits to 32 bytes: every byte gets the byte that holds its bit, and keeps it where the bit is set.
  static __m256i spread(const uint8_t* four_bytes) {
    int bits;
    std::memcpy(&bits, four_bytes, sizeof bits);
    const __m256i source = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    const __m256i select = _mm256_set1_epi64x(static_cast<long long>(0x8040201008040201ull));
    return _mm256_cmpeq_epi8(_mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(bits), source), select), select);
  }

  static void unpack(const uint8_t* words, int bits, const uint8_t* levels, int64_t quads, uint8_t* out) {
    for (int64_t quad = 0; quad < quads; ++quad, words += 8 * bits) {
      for (int half = 0; half < 2; ++half) {
        __m256i sum = _mm256_setzero_si256();
        for (int plane = 0; plane < bits; ++plane) {
          sum = _mm256_sub_epi8(_mm256_add_epi8(sum, sum), spread(words + 8 * plane + 4 * half));  // a set bit is -1
        }
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + quad * kCodesPerQuad + 32 * half), sum);
      }
    }
    if (levels) look_up(levels, bits, quads * kCodesPerQuad, out);
  }

  // Codes to levels, 16 of the codebook at a time: vpshufb takes the low four bits of a code, the high ones say whether it applies.
  [[gnu::noinline]] static void look_up(const uint8_t* levels, int bits, int64_t count, uint8_t* codes) {
    for (int64_t i = 0; i < count; i += 32) {
      auto* place = reinterpret_cast<__m256i*>(codes + i);
      const __m256i code = _mm256_loadu_si256(place);
      const __m256i part = _mm256_and_si256(_mm256_srli_epi16(code, 4), _mm256_set1_epi8(15));
      __m256i found = _mm256_setzero_si256();
      for (int first = 0; first < 1 << bits; first += 16) {
        const __m256i table = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(levels + first)));
        const __m256i here = _mm256_cmpeq_epi8(part, _mm256_set1_epi8(static_cast<char>(first >> 4)));
        found = _mm256_blendv_epi8(found, _mm256_shuffle_epi8(table, code), here);
      }
      _mm256_storeu_si256(place, found);
    }
  }

  template <int Rows>
  static void accumulate(const Segment& segment, const ActivationSegment& x, float* sums) {
    constexpr int kRows = 4;  // of x at a time: eight sums, so that all fits 16 registers
    for (int first = 0; first < Rows; first += kRows) {
      const int rows = Rows - first < kRows ? Rows - first : kRows;
      __m256i totals[kRows][2];
      for (int b = 0; b < rows; ++b) {
        totals[b][0] = totals[b][1] = _mm256_set1_epi32(x.negative_sum[first + b] * (1 << segment.shift));
      }
      for (int64_t quad = 0; quad < segment.quads; ++quad) {
        const int8_t* q = x.codes + (quad * Rows + first) * kQuad;
        __m256i even[2], odd[2];
        for (int half = 0; half < 2; ++half) {
          const uint8_t* w = segment.levels + quad * kCodesPerQuad + 32 * half;
          const __m256i codes = _mm256_load_si256(reinterpret_cast<const __m256i*>(w));
          even[half] = _mm256_and_si256(codes, _mm256_set1_epi16(0xff));
          odd[half] = _mm256_srli_epi16(codes, 8);
        }
        for (int b = 0; b < rows; ++b) {
          int four;
          std::memcpy(&four, q + b * kQuad, sizeof four);
          const __m256i v = _mm256_set1_epi32(four);
          const __m256i low = _mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8), high = _mm256_srai_epi16(v, 8);
          for (int half = 0; half < 2; ++half) {
            const __m256i sum = _mm256_add_epi32(_mm256_madd_epi16(even[half], low), _mm256_madd_epi16(odd[half], high));
            totals[b][half] = _mm256_add_epi32(totals[b][half], sum);
          }
        }
      }
      for (int b = 0; b < rows; ++b) {
        for (int half = 0; half < 2; ++half) {
          float* out = sums + (first + b) * kTileRows + 8 * half;
          const __m256 scale = _mm256_load_ps(segment.grid->scale + 8 * half);
          const __m256 step = _mm256_mul_ps(scale, _mm256_set1_ps(x.scale[first + b]));
          __m256 sum = _mm256_fmadd_ps(step, _mm256_cvtepi32_ps(totals[b][half]), _mm256_loadu_ps(out));
          if (x.sum) {
            const __m256 centre = _mm256_load_ps(segment.grid->centre + 8 * half);
            sum = _mm256_fmadd_ps(centre, _mm256_set1_ps(x.sum[first + b]), sum);
          }
          _mm256_storeu_ps(out, sum);
        }
      }
    }
  }
};

}  // namespace

const Isa kAvx2{"avx2", dot<Avx2>, bit_dot_avx2, Avx2::unpack};

}  // namespace kbit

#endif

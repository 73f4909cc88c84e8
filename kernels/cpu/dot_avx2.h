// What the instruction sets with vectors of 32 bytes share: unpacking, and the loop over rows of x.
#pragma once

#include <immintrin.h>

#include "dot.h"

namespace kbit {
namespace {  // see dot.h

inline __m256i load_levels(const uint8_t* levels) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(levels)); }

inline __m256i broadcast_quad(const int8_t* q) {
  int four;
  std::memcpy(&four, q, sizeof four);
  return _mm256_set1_epi32(four);
}

// Codes are put together by transpositions of bits (Warren, Hacker's Delight, 7-3): those of 4 planes at a time.
class Unpacker {
 public:
  explicit Unpacker(int bits) : bits_(bits), first_(bytes_of(bits > 4 ? bits - 4 : bits)) {}

  // [16 rows][4 columns] of one quad.
  void codes(const uint8_t* words, uint8_t* out) const {
    const __m256i mask = _mm256_set1_epi8(15), high = nibbles(words, first_);
    __m256i even = _mm256_and_si256(high, mask), odd = _mm256_and_si256(_mm256_srli_epi16(high, 4), mask);
    if (bits_ > 4) {
      const __m256i low = nibbles(words + 8 * (bits_ - 4), bytes_of(4));
      even = _mm256_or_si256(_mm256_slli_epi16(even, 4), _mm256_and_si256(low, mask));
      odd = _mm256_or_si256(_mm256_slli_epi16(odd, 4), _mm256_and_si256(_mm256_srli_epi16(low, 4), mask));
    }
    const __m256i first = _mm256_unpacklo_epi32(even, odd), second = _mm256_unpackhi_epi32(even, odd);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_permute2x128_si256(first, second, 0x20));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 32), _mm256_permute2x128_si256(first, second, 0x31));
  }

 private:
  // In a lane that holds 4 bytes of each of `planes` words: byte b of each, the last word's first, for dword b.
  static __m256i bytes_of(int planes) {
    alignas(32) uint8_t source[32];
    for (int i = 0; i < 32; ++i) source[i] = static_cast<uint8_t>(i % 4 < planes ? 4 * (planes - 1 - i % 4) + i % 16 / 4 : 0x80);
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(source));
  }

  // Dword b: the 4 columns of row 2 b, in the low halves of its bytes, and of row 2 b + 1, in the high ones.
  static __m256i nibbles(const uint8_t* words, __m256i bytes) {
    const __m256i planes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words));
    const __m256i lanes = _mm256_permutevar8x32_epi32(planes, _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7));
    return swap_bits<14>(swap_bits<7>(_mm256_shuffle_epi8(lanes, bytes), 0x00aa00aa), 0x0000cccc);
  }

  // In every dword, the bits of `mask` change places with those `Distance` above them.
  template <int Distance>
  static __m256i swap_bits(__m256i x, int mask) {
    const __m256i differing = _mm256_and_si256(_mm256_xor_si256(x, _mm256_srli_epi32(x, Distance)), _mm256_set1_epi32(mask));
    return _mm256_xor_si256(x, _mm256_xor_si256(differing, _mm256_slli_epi32(differing, Distance)));
  }

  int bits_;
  __m256i first_;
};

// `Products` has the number kRows of rows of x that it takes at a time, and for up to so many
//   add<Rows>(segment, q, stride, totals)    totals[row of x][half] += levels of 8 rows @ codes of x, of which a quad is `stride` on
template <class Products, int Rows>
inline void add_rows(const Segment& segment, const ActivationSegment& x, int stride, int first, float* sums) {
  __m256i totals[Rows][2];
#pragma GCC unroll 4
  for (int b = 0; b < Rows; ++b) {
    totals[b][0] = totals[b][1] = _mm256_set1_epi32(x.negative_sum[first + b] * (1 << segment.shift));
  }
  Products::template add<Rows>(segment, x.codes + first * kQuad, stride * kQuad, totals);
#pragma GCC unroll 4
  for (int b = 0; b < Rows; ++b) {
#pragma GCC unroll 2
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

template <class Products, int Rows>
inline void add_rows_from(const Segment& segment, const ActivationSegment& x, int rows, int first, float* sums) {
  for (; first + Rows <= rows; first += Rows) add_rows<Products, Rows>(segment, x, rows, first, sums);
  if constexpr (Rows > 1) add_rows_from<Products, Rows - 1>(segment, x, rows, first, sums);
}

template <class Products>
inline void add_all_rows(const Segment& segment, const ActivationSegment& x, int rows, float* sums) {
  add_rows_from<Products, Products::kRows>(segment, x, rows, 0, sums);
}

// The machine of dot(), of which `add(segment, activations, rows, sums)` is how an instruction set multiplies.
template <void (*add)(const Segment&, const ActivationSegment&, int, float*)>
struct Avx2Dot {
  static void unpack(const uint8_t* words, int bits, const uint8_t* levels, int64_t quads, uint8_t* out) {
    const Unpacker unpacker(bits);
    for (int64_t quad = 0; quad < quads; ++quad) unpacker.codes(words + quad * 8 * bits, out + quad * kCodesPerQuad);
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
    add(segment, x, Rows, sums);
  }
};

}  // namespace
}  // namespace kbit

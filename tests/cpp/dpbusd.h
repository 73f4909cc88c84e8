// vpdpbusd by instructions of AVX2, so that a source for AVX-VNNI runs on machines without it. To be included before the source.
#pragma once

#include <immintrin.h>

#define __AVXVNNI__ 1
#define _mm256_dpbusd_avx_epi32 dpbusd_by_avx2

// total + the products of 4 unsigned bytes of `a` and 4 signed bytes of `b`, in each of 8 lanes.
static inline __m256i dpbusd_by_avx2(__m256i total, __m256i a, __m256i b) {
  for (int i = 0; i < 4; ++i) {
    const __m256i unsigned_byte = _mm256_and_si256(_mm256_srli_epi32(a, 8 * i), _mm256_set1_epi32(0xff));
    const __m256i signed_byte = _mm256_srai_epi32(_mm256_slli_epi32(b, 24 - 8 * i), 24);
    total = _mm256_add_epi32(total, _mm256_mullo_epi32(unsigned_byte, signed_byte));
  }
  return total;
}

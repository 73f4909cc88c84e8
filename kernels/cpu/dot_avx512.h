// What the kernels for AVX-512 share: the integers of a segment, scaled and added to the sums. Each is compiled with its own flags.
#pragma once

#include <immintrin.h>

#include "dot.h"

namespace kbit {
namespace {

// sums[row of x][16] += scale * a * totals + centre * sum
template <int Rows, class Activations>  // with a scale and a sum for each row
inline void add_totals(const __m512i (&totals)[Rows], const float* scales, const float* centres, const Activations& x, float* sums) {
  const __m512 scale = _mm512_load_ps(scales), centre = _mm512_load_ps(centres);
#pragma GCC unroll 16
  for (int b = 0; b < Rows; ++b) {
    __m512 sum = _mm512_loadu_ps(sums + b * kTileRows);
    sum = _mm512_fmadd_ps(_mm512_mul_ps(scale, _mm512_set1_ps(x.scale[b])), _mm512_cvtepi32_ps(totals[b]), sum);
    if (x.sum) sum = _mm512_fmadd_ps(centre, _mm512_set1_ps(x.sum[b]), sum);
    _mm512_storeu_ps(sums + b * kTileRows, sum);
  }
}

}  // namespace
}  // namespace kbit

// AVX-VNNI (Alder Lake and later): vpdpbusd for processors without AVX-512.
#include "isa.h"

#ifdef __AVXVNNI__

#include "bit_vectors.h"
#include "dot_avx2.h"
#include "lookup_avx2.h"

namespace kbit {
namespace {

struct Bytes {
  static constexpr int kRows = 4;

  template <int Rows>
  static void add(const Segment& segment, const int8_t* q, int64_t stride, __m256i (&totals)[Rows][2]) {
    for (int64_t quad = 0; quad < segment.quads; ++quad, q += stride) {
      const uint8_t* levels = segment.levels + quad * kCodesPerQuad;
      const __m256i low = load_levels(levels), high = load_levels(levels + 32);
#pragma GCC unroll 4
      for (int b = 0; b < Rows; ++b) {
        const __m256i four = broadcast_quad(q + b * kQuad);
        totals[b][0] = _mm256_dpbusd_avx_epi32(totals[b][0], low, four);
        totals[b][1] = _mm256_dpbusd_avx_epi32(totals[b][1], high, four);
      }
    }
  }
};

using AvxVnni = Avx2Dot<add_all_rows<Bytes>>;

}  // namespace

const Isa kAvxVnni{"avxvnni", dot_or_look_up<AvxVnni>, bit_dot_avx2, AvxVnni::unpack, table_bytes, fill_table};

}  // namespace kbit

#endif

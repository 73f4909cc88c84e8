// Plain C++, for any machine: the oracle of the other instruction sets.
#include "bit_vectors.h"
#include "dot.h"
#include "isa.h"

namespace kbit {
namespace {

struct Portable {
  static void unpack(const uint8_t* words, int bits, const uint8_t* levels, int64_t quads, uint8_t* out) {
    for (int64_t quad = 0; quad < quads; ++quad, words += 8 * bits, out += kCodesPerQuad) {
      for (int i = 0; i < kCodesPerQuad; ++i) {
        unsigned code = 0;
        for (int plane = 0; plane < bits; ++plane) code = code << 1 | (words[8 * plane + i / 8] >> i % 8 & 1);
        out[i] = levels ? levels[code] : static_cast<uint8_t>(code);
      }
    }
  }

  template <int Rows>
  static void accumulate(const Segment& segment, const ActivationSegment& x, float* sums) {
    for (int b = 0; b < Rows; ++b) {
      int32_t totals[kTileRows];
      for (int row = 0; row < kTileRows; ++row) totals[row] = x.negative_sum[b] * (1 << segment.shift);
      for (int64_t quad = 0; quad < segment.quads; ++quad) {
        const uint8_t* w = segment.levels + quad * kCodesPerQuad;
        const int8_t* q = x.codes + (quad * Rows + b) * kQuad;
        for (int row = 0; row < kTileRows; ++row) {
          for (int c = 0; c < kQuad; ++c) totals[row] += w[row * kQuad + c] * q[c];
        }
      }
      for (int row = 0; row < kTileRows; ++row) {
        sums[b * kTileRows + row] += segment.grid->scale[row] * (x.scale[b] * static_cast<float>(totals[row]));
        if (x.sum) sums[b * kTileRows + row] += segment.grid->centre[row] * x.sum[b];
      }
    }
  }
};

}  // namespace

const Isa kPortable{"portable", dot<Portable>, bit_dot_portable, Portable::unpack};

}  // namespace kbit

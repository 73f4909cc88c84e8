// Plain C++, for any machine: the oracle of the other instruction sets.
#include "bit_dot.h"

namespace kbit {
namespace {

struct Portable {
  // As sums of neighbours in ever wider fields, which compilers vectorize on every machine (Warren, "Hacker's Delight", 5-1).
  static uint32_t popcount(uint32_t v) {
    v -= v >> 1 & 0x55555555u;
    v = (v & 0x33333333u) + (v >> 2 & 0x33333333u);
    v = (v + (v >> 4)) & 0x0f0f0f0fu;
    v += v >> 8;
    return (v + (v >> 16)) & 0x3f;
  }

  template <int Rows, bool Xor>
  static void accumulate(const BitSegment& segment, const BitActivations& x, float* sums) {
    int32_t totals[Rows][kTileRows] = {};
    for (int64_t word = 0; word < segment.count; ++word) {
      for (int plane = 0; plane < segment.bits; ++plane) {
        uint32_t w[kTileRows];
        std::memcpy(w, segment.words + word_offset(word, segment.bits, plane, 0), sizeof w);
        for (int b = 0; b < Rows; ++b) {
          for (int i = 0; i < x.count; ++i) {
            const uint32_t v = x.at(word, b, i);
            const int shift = segment.bits - 1 - plane + i;
            const int32_t factor = !Xor && i == x.count - 1 ? -(1 << shift) : 1 << shift;
            for (int row = 0; row < kTileRows; ++row) {
              totals[b][row] += factor * static_cast<int32_t>(popcount(Xor ? w[row] ^ v : w[row] & v));
            }
          }
        }
      }
    }
    for (int b = 0; b < Rows; ++b) {
      for (int row = 0; row < kTileRows; ++row) {
        const int32_t total = x.base[b] + (Xor ? -totals[b][row] : totals[b][row]);
        sums[b * kTileRows + row] += segment.grid->scale[row] * (x.scale[b] * static_cast<float>(total));
        if (x.sum) sums[b * kTileRows + row] += segment.grid->centre[row] * x.sum[b];
      }
    }
  }
};

}  // namespace

void bit_dot_portable(const TiledWeight& weight, int64_t row_block, const ActivationBlock* blocks, int64_t count, float* sums) {
  bit_dot<Portable>(weight, row_block, blocks, count, sums);
}

}  // namespace kbit

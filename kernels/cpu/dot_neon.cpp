// NEON with its dot products (Armv8.2 and later): sdot multiplies bytes with signs, so levels are taken less 128.
#include "isa.h"

#ifdef __ARM_FEATURE_DOTPROD

#include <arm_neon.h>

#include "bit_vectors.h"
#include "dot.h"

namespace kbit {
namespace {

constexpr int kVectors = 4;  // of 16 bytes, 4 rows, to a quad

struct Neon {
  static void unpack(const uint8_t* words, int bits, const uint8_t* levels, int64_t quads, uint8_t* out) {
    const uint8x16_t select = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201));
    for (int64_t quad = 0; quad < quads; ++quad, words += 8 * bits, out += kCodesPerQuad) {
      for (int vector = 0; vector < kVectors; ++vector) {
        uint8x16_t sum = vdupq_n_u8(0);
        for (int plane = 0; plane < bits; ++plane) {
          const uint8_t* two = words + 8 * plane + 2 * vector;
          const uint8x16_t set = vtstq_u8(vcombine_u8(vdup_n_u8(two[0]), vdup_n_u8(two[1])), select);  // a set bit is -1
          sum = vsubq_u8(vaddq_u8(sum, sum), set);
        }
        vst1q_u8(out + 16 * vector, levels ? look_up(levels, bits, sum) : sum);
      }
    }
  }

  // Past the end of a table vqtbl gives 0 and vqtbx what was there.
  static uint8x16_t look_up(const uint8_t* levels, int bits, uint8x16_t codes) {
    const uint8x16_t found = vqtbl4q_u8(vld1q_u8_x4(levels), codes);
    return bits < 7 ? found : vqtbx4q_u8(found, vld1q_u8_x4(levels + 64), vsubq_u8(codes, vdupq_n_u8(64)));
  }

  template <int Rows>
  static void accumulate(const Segment& segment, const ActivationSegment& x, float* sums) {
    constexpr int kRows = 4;  // of x at a time: sixteen sums and four vectors of levels
    for (int first = 0; first < Rows; first += kRows) {
      const int rows = Rows - first < kRows ? Rows - first : kRows;
      int32x4_t totals[kRows][kVectors];
      for (int b = 0; b < rows; ++b) {
        const int32_t negative_sum = x.negative_sum[first + b];
        for (int32x4_t& total : totals[b]) total = vdupq_n_s32(negative_sum * (1 << segment.shift) - negative_sum * 128);
      }
      for (int64_t quad = 0; quad < segment.quads; ++quad) {
        const int8_t* q = x.codes + (quad * Rows + first) * kQuad;
        int8x16_t w[kVectors];
        for (int vector = 0; vector < kVectors; ++vector) {
          const uint8x16_t levels = vld1q_u8(segment.levels + quad * kCodesPerQuad + 16 * vector);
          w[vector] = vreinterpretq_s8_u8(veorq_u8(levels, vdupq_n_u8(128)));
        }
        for (int b = 0; b < rows; ++b) {
          int32_t four;
          std::memcpy(&four, q + b * kQuad, sizeof four);
          const int8x16_t v = vreinterpretq_s8_s32(vdupq_n_s32(four));
          for (int vector = 0; vector < kVectors; ++vector) totals[b][vector] = vdotq_s32(totals[b][vector], w[vector], v);
        }
      }
      for (int b = 0; b < rows; ++b) {
        for (int vector = 0; vector < kVectors; ++vector) {
          float* out = sums + (first + b) * kTileRows + 4 * vector;
          const float32x4_t step = vmulq_n_f32(vld1q_f32(segment.grid->scale + 4 * vector), x.scale[first + b]);
          float32x4_t sum = vfmaq_f32(vld1q_f32(out), step, vcvtq_f32_s32(totals[b][vector]));
          if (x.sum) sum = vfmaq_n_f32(sum, vld1q_f32(segment.grid->centre + 4 * vector), x.sum[first + b]);
          vst1q_f32(out, sum);
        }
      }
    }
  }
};

}  // namespace

const Isa kNeon{"neon", dot<Neon>, bit_dot_portable, Neon::unpack};

}  // namespace kbit

#endif

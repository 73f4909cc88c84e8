// The loop of a tiled product, for any instruction set: unpack a segment of a row block once, use it for all rows of x.
//
// With s, o the scale and offset of a row, l its levels and a q the activations (a their scale, q their codes):
//   sum (s l + o) a q  =  s a sum (l - m) q  +  (o + s m) sum a q        m = 2 ** (level_bits - 1)
// The first sum is exact in int32, and taking the levels about their middle keeps the second term small. Where time is all arithmetic
// they are taken as they are, m = 0, which saves an instruction for each row of x: the terms are then larger than their sum, by no more
// than the levels are wider than what they stand for, of float32's 24 bits.
#pragma once

#include "tiled.h"

#ifdef __F16C__
#include <immintrin.h>
#endif
#ifdef __aarch64__
#include <arm_neon.h>
#endif

namespace kbit {
namespace {  // this header is compiled once for every instruction set: nothing of it may be shared between them

inline float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t magnitude = half & 0x7fff;
  uint32_t bits;
  float value;
  if (magnitude >= 0x7c00) {
    bits = sign | 0x7f800000 | (magnitude & 0x3ff) << 13;
  } else if (magnitude >= 0x0400) {
    bits = sign | ((magnitude << 13) + (112u << 23));
  } else {
    value = static_cast<float>(magnitude) * 0x1p-24f;
    std::memcpy(&bits, &value, 4);
    bits |= sign;
  }
  std::memcpy(&value, &bits, 4);
  return value;
}

// 16 float16 at `bytes` to floats.
inline void read_halves(const uint8_t* bytes, float* values) {
#ifdef __F16C__
  for (int i = 0; i < kTileRows; i += 8) {
    _mm256_storeu_ps(values + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + 2 * i))));
  }
#elif defined(__aarch64__)
  for (int i = 0; i < kTileRows; i += 4) {
    vst1q_f32(values + i, vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(bytes + 2 * i))));
  }
#else
  for (int i = 0; i < kTileRows; ++i) {
    uint16_t half;
    std::memcpy(&half, bytes + 2 * i, 2);
    values[i] = half_to_float(half);
  }
#endif
}

// The scales of one group of a row block and what their levels' middle stands for.
struct alignas(64) Grid {
  float scale[kTileRows];
  float centre[kTileRows];  // offset + scale * middle
  float offset[kTileRows];  // of level 0

  Grid(const TiledWeight& weight, const uint8_t* block, int64_t group) {
    read_halves(block + group * kTileRows * 2, scale);
    const float middle = static_cast<float>(1 << (weight.level_bits - 1));
    if (weight.symmetric) {  // levels lie about zero; at 1 bit they are +-scale/2
      for (int row = 0; row < kTileRows; ++row) {
        centre[row] = weight.level_bits == 1 ? 0.5f * scale[row] : 0.0f;
        offset[row] = centre[row] - scale[row] * middle;
      }
      return;
    }
    read_halves(block + (weight.groups + group) * kTileRows * 2, offset);
    for (int row = 0; row < kTileRows; ++row) centre[row] = offset[row] + scale[row] * middle;
  }
};

// One segment of a row block for one block of x: sums[row of x][16] += scale * a * (levels @ q) + centre * sum.
struct Segment {
  const uint8_t* levels;  // [quads][64]
  int64_t quads;
  const Grid* grid;
  int shift;  // level_bits - 1
};

struct ActivationSegment {
  const int8_t* codes;
  const float* scale;
  const int32_t* negative_sum;
  const float* sum;  // null but in the first segment of a group
};

// `Machine` has unpack (an UnpackKernel) and accumulate<Rows>(segment, activations, sums).
template <class Machine, int Rows = kActivationRows>
inline void accumulate_rows(int rows, const Segment& segment, const ActivationSegment& x, float* sums) {
  if constexpr (Rows > 0) {
    if (rows == Rows) return Machine::template accumulate<Rows>(segment, x, sums);
    return accumulate_rows<Machine, Rows - 1>(rows, segment, x, sums);
  }
}

template <class Machine>
void dot(const TiledWeight& weight, int64_t row_block, const ActivationBlock* blocks, int64_t count, float* sums) {
  alignas(64) uint8_t levels[kSegmentQuads * kCodesPerQuad];
  int64_t rows = 0;
  for (int64_t b = 0; b < count; ++b) rows += blocks[b].rows;
  std::memset(sums, 0, rows * kTileRows * sizeof(float));
  const uint8_t* block = weight.block(row_block);
  const uint8_t* words = block + weight.grid_bytes;
  int64_t segment_index = 0, first_quad = 0;
  for (int64_t group = 0; group < weight.groups; ++group) {
    const Grid grid(weight, block, group);
    const int64_t quads = weight.quads_of(group);
    for (int64_t begin = 0; begin < quads; begin += kSegmentQuads, ++segment_index) {
      const int64_t length = quads - begin < kSegmentQuads ? quads - begin : kSegmentQuads;
      Machine::unpack(words, weight.bits, weight.levels, length, levels);
      words += length * 8 * weight.bits;
      const Segment segment{levels, length, &grid, weight.level_bits - 1};
      float* out = sums;
      for (int64_t b = 0; b < count; ++b) {
        const ActivationBlock& x = blocks[b];
        const ActivationSegment part{x.codes + first_quad * x.rows * kQuad, x.scale + segment_index * x.rows,
                                     x.negative_sum + segment_index * x.rows,
                                     begin ? nullptr : x.sum + group * x.rows};
        accumulate_rows<Machine>(x.rows, segment, part, out);
        out += x.rows * kTileRows;
      }
      first_quad += length;
    }
  }
}

}  // namespace
}  // namespace kbit

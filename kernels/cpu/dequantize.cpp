#include "dequantize.h"

#include <algorithm>

#include <ATen/Parallel.h>

#include "bit_vectors.h"
#include "cascade.h"
#include "isa.h"
#include "tiled_linear.h"

namespace kbit {
namespace {

constexpr int64_t kGrain = 1 << 14;  // values worth handing to another thread

// Levels of `count` columns of a row, a segment at most, from `words` on, which then stand behind them.
void read_levels(const TiledWeight& weight, int64_t lane, int64_t count, const uint8_t*& words, uint8_t* levels) {
  if (weight.vectors) {
    read_codes(words, count, weight.bits, lane, levels);
    words += word_offset(ceil_div(count, kWordColumns), weight.bits, 0, 0);
    return;
  }
  alignas(64) uint8_t quads[kSegmentQuads * kCodesPerQuad];
  const int64_t length = ceil_div(count, kQuad);
  isa().unpack(words, weight.bits, weight.levels, length, quads);
  words += length * 8 * weight.bits;
  for (int64_t i = 0; i < count; ++i) levels[i] = quads[i / kQuad * kCodesPerQuad + lane * kQuad + i % kQuad];
}

c10::Half half_at(const uint8_t* bytes) {
  c10::Half value;
  std::memcpy(&value, bytes, sizeof value);
  return value;
}

}  // namespace

// scale * level is exact (11 + 8 bits) and so is scale * midpoint: every weight is rounded once, by the addition.
void dequantize_row(const TiledWeight& weight, int64_t row, float* out) {
  if (weight.cascade) {
    CascadeBlock cascade;
    return dequantize_row(cascade.of(weight, row / kTileRows), row % kTileRows, out);
  }
  const uint8_t* block = weight.block(row / kTileRows);
  const uint8_t* words = block + weight.grid_bytes;
  const int64_t lane = row % kTileRows;
  const float midpoint = weight.level_bits == 1 ? 0.5f : static_cast<float>(1 << (weight.level_bits - 1));
  uint8_t levels[kSegmentQuads * kQuad];
  for (int64_t group = 0; group < weight.groups; ++group) {
    const float scale = to_float(half_at(block + (group * kTileRows + lane) * 2));
    const float offset = weight.symmetric ? -midpoint * scale
                                          : to_float(half_at(block + ((weight.groups + group) * kTileRows + lane) * 2));
    const int64_t end = std::min((group + 1) * weight.group_size, weight.columns);
    for (int64_t c = group * weight.group_size; c < end;) {
      const int64_t count = std::min<int64_t>(kSegmentQuads * kQuad, end - c);
      read_levels(weight, lane, count, words, levels);
      for (int64_t i = 0; i < count; ++i) out[c + i] = scale * levels[i] + offset;
      c += count;
    }
  }
}

void tiled_dequantize(const TiledWeight& weight, int64_t begin, int64_t end, float* out) {
  at::parallel_for(begin, end, kGrain / (weight.columns + 1) + 1, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      float* values = out + (row - begin) * weight.columns;
      dequantize_row(weight, row, values);
      for (int64_t c = 0; c < weight.columns; ++c) values[c] *= weight.global_scale;
    }
  });
}

void tiled_embedding(const TiledWeight& weight, const int64_t* indices, int64_t count, void* out, Dtype dtype) {
  with_type(dtype, [&](auto* type) {
    auto* rows = static_cast<decltype(type)>(out);
    at::parallel_for(0, count, kGrain / (weight.columns + 1) + 1, [&](int64_t begin, int64_t end) {
      std::vector<float> values(weight.columns);
      for (int64_t i = begin; i < end; ++i) {
        dequantize_row(weight, indices[i], values.data());
        auto* row = rows + i * weight.columns;
        for (int64_t c = 0; c < weight.columns; ++c) {
          row[c] = static_cast<std::decay_t<decltype(*type)>>(values[c] * weight.global_scale);
        }
      }
    });
  });
}

}  // namespace kbit

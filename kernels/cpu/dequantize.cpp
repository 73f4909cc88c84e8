#include "dequantize.h"

#include <algorithm>
#include <array>
#include <utility>

#include "unpack.h"

namespace kbit {
namespace {

// At 1 bit the symmetric levels are +-scale/2 (midpoint in ../layout.py).
template <int Bits>
constexpr float kMidpoint = Bits == 1 ? 0.5f : static_cast<float>(1 << (Bits - 1));

// Where `group` ends, counted from `column` and within one block; the last group also covers the padding.
inline int64_t end_of_group(const Weight& weight, int64_t group, int64_t column) {
  if (group == weight.groups() - 1) return kBlock;
  return std::min(kBlock, (group + 1) * weight.group_size - column);
}

// A span is a run of columns that lies in one group, its length known to the compiler; 0 stands for any length.
// scale * code is exact (11 + 8 bits) and so is scale * midpoint: every weight is rounded once, by the addition.
template <int Bits, int Span>
void dequantize_row(const Weight& weight, int64_t row, int64_t begin, int64_t end, float* out) {
  const ptrdiff_t plane_stride = weight.rows * weight.width();
  const uint8_t* bytes = weight.planes + row * weight.width();
  const c10::Half* scale = weight.scale + row * weight.groups();
  const c10::Half* offset = weight.offset ? weight.offset + row * weight.groups() : nullptr;
  for (int64_t column = begin; column < end; column += kBlock, out += kBlock) {
    alignas(64) uint8_t codes[kBlock];
    const int64_t available = weight.width() - column / 8;
    if (available >= 8) {
      unpack_block<Bits>(bytes + column / 8, plane_stride, codes);
    } else {
      unpack_tail<Bits>(bytes + column / 8, plane_stride, available, codes);
    }
    int64_t last = 0;
    for (int64_t first = 0; first < kBlock; first = last) {
      const int64_t group = std::min((column + first) / weight.group_size, weight.groups() - 1);
      last = Span ? first + Span : end_of_group(weight, group, column);
      const float step = to_float(scale[group]);
      const float zero = offset ? to_float(offset[group]) : -kMidpoint<Bits> * step;
      for (int64_t i = first; i < last; ++i) out[i] = step * codes[i] + zero;
    }
  }
}

using Kernel = Dequantizer::Kernel;

template <int Span, int... Index>
Kernel kernel_for(int bits, std::integer_sequence<int, Index...>) {
  static constexpr std::array<Kernel, sizeof...(Index)> kernels = {dequantize_row<Index + 1, Span>...};
  return kernels[bits - 1];
}

template <int Span>
Kernel kernel_for(int bits) {
  return kernel_for<Span>(bits, std::make_integer_sequence<int, 8>{});
}

Kernel kernel_for(int span, int bits) {
  switch (span) {
    case 64: return kernel_for<64>(bits);
    case 32: return kernel_for<32>(bits);
    case 16: return kernel_for<16>(bits);
    default: return kernel_for<0>(bits);
  }
}

// The longest span, of those that have a kernel, that never straddles two groups.
int span_of(const Weight& weight) {
  if (weight.group_size >= weight.columns) return 64;
  for (int span : {64, 32, 16}) {
    if (weight.group_size % span == 0) return span;
  }
  return 0;
}

}  // namespace

Dequantizer::Dequantizer(const Weight& weight) : weight_(weight), kernel_(kernel_for(span_of(weight), weight.bits)) {}

}  // namespace kbit

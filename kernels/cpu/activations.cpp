#include "activations.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <mutex>

#include <ATen/Parallel.h>

#include "activation.h"
#include "bit_vectors.h"
#include "vector.h"

namespace kbit::inline KBIT_LEVEL {
namespace {

constexpr int64_t kGrain = 1 << 14;  // values worth handing to another thread
constexpr uintptr_t kCacheLine = 64;
constexpr int kMaxSegment = kSegmentQuads * kQuad;
typedef int8_t Digits __attribute__((vector_size(16)));

int digits_of(int bits) { return bits <= 8 ? 1 : (bits + 7) / 8; }

int64_t segments_of(const TiledLayout& layout) {
  if (!layout.groups) return 0;
  return (layout.groups - 1) * ceil_div(layout.group_quads, kSegmentQuads) +
         ceil_div(layout.quads_of(layout.groups - 1), kSegmentQuads);
}

// The largest integer that `digits` balanced digits, each -128..127, surely hold; at one digit the grid of `bits` bits.
float largest_code(int bits) { return bits <= 8 ? static_cast<float>((1 << (bits - 1)) - 1) : std::ldexp(127.0f, bits - 8); }

// The step of a segment's grid. Zero when all its values are zeros, or so small that steps would underflow.
float step_of(float largest, int bits) {
  if (largest < 0x1p-100f) return 0;
  if (bits == 1) return largest;
  const float step = largest / largest_code(bits);
  if (bits <= 8) return step;
  int exponent;
  std::frexp(step, &exponent);
  return std::ldexp(1.0f, exponent);  // a power of two, at least `step`
}

// The largest magnitude as bits, which order as their floats do. Compilers vectorize a maximum of integers, but not one of floats.
int32_t largest_magnitude_bits(const float* values, int64_t count) {
  int32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) largest = std::max(largest, std::bit_cast<int32_t>(values[i]) & 0x7fffffff);
  return largest;
}

float largest_magnitude(const float* values, int64_t count) {
  return std::bit_cast<float>(largest_magnitude_bits(values, count));
}

float mean_magnitude(const float* values, int count) {
  float total = 0;
  for (int i = 0; i < count; ++i) total += std::fabs(values[i]);
  return total / static_cast<float>(count);
}

// Integers next to values / step, to even where there are two.
void round_to_grid(const float* values, int count, float step, int32_t* codes) {
  const float inverse = step ? 1 / step : 0;
  for (int i = 0; i < count; ++i) codes[i] = static_cast<int32_t>(std::nearbyint(values[i] * inverse));
}

// Takes the lowest digit, -128..127, off every code.
void lowest_digit(int32_t* codes, int count, int8_t* digit) {
  for (int i = 0; i < count; ++i) {
    digit[i] = static_cast<int8_t>(codes[i] & 0xff);
    codes[i] = (codes[i] - digit[i]) >> 8;
  }
}

// Whether sums of a row's integers, which come before the weight's own scale, stay within float32: they are up to 2 ** 31 times as
// large as its values in a group, and added up over the groups. A row with an infinity or NaN is none such.
bool is_moderate(const float* values, int64_t count) {
  constexpr int32_t kLimit = (127 + 80) << 23;  // the bits of 2 ** 80
  return largest_magnitude_bits(values, count) < kLimit;
}

double sum_of_squares(const float* values, int64_t count) {
  float lanes[16] = {};
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    for (int lane = 0; lane < 16; ++lane) lanes[lane] += values[i + lane] * values[i + lane];
  }
  double total = 0;
  for (; i < count; ++i) total += static_cast<double>(values[i]) * values[i];
  for (float lane : lanes) total += lane;
  return total;
}

// Where the digits of one segment of one row of x go.
struct Slot {
  int8_t* codes;  // of the segment's first quad and this row's first digit
  float* scale;
  int32_t* negative_sum;
  float* sum;
  int rows;  // of the block
  uint32_t* planes = nullptr;  // of the segment's first word and this row's first digit
  int plane_count = 0;
};

// The codes of a digit, with zeros behind them to the end of the word, as bit vectors `stride` words apart.
void cut_planes(const int8_t* digit, int64_t words, bool plus_minus, int count, int64_t stride, uint32_t* planes) {
  for (int64_t word = 0; word < words; ++word, planes += stride) {
    std::fill_n(planes, count, 0u);
    for (int part = 0; part < 4; ++part) {
      uint64_t eight = 0;  // code j in byte j on either byte order
      for (int j = 0; j < 8; ++j) {
        const int code = digit[word * kWordColumns + part * 8 + j];
        eight |= static_cast<uint64_t>(static_cast<uint8_t>(plus_minus ? code > 0 : code)) << (8 * j);
      }
      for (int i = 0; i < count; ++i) {
        const uint64_t ones = (eight >> i) & 0x0101010101010101;
        planes[i] |= static_cast<uint32_t>((ones * 0x0102040810204080) >> 56) << (8 * part);
      }
    }
  }
}

// Codes of one digit next to values / step, to even where there are two, and their sum. `count` is a multiple of 16.
//
// Adding 1.5 * 2 ** 23 rounds a float to an integer, and leaves it in the low bits.
int32_t round_to_digit(const float* values, int count, float step, int8_t* codes) {
  constexpr float kMagic = 12582912.0f;
  const float inverse = step ? 1 / step : 0;
  Ints total{};
  for (int i = 0; i < count; i += 16) {
    Floats v;
    std::memcpy(&v, values + i, sizeof v);
    v = v * inverse + kMagic;
    Ints code;
    std::memcpy(&code, &v, sizeof v);
    code -= std::bit_cast<int32_t>(kMagic);
    total += code;
    const auto digit = __builtin_convertvector(code, Digits);
    std::memcpy(codes + i, &digit, sizeof digit);
  }
  const auto pair = fold<2, 16, int32_t>(total);
  return pair[0] + pair[1];
}

void store_quads(const int8_t* digit, int quads, int rows, int8_t* codes) {
  if (rows == 1) {
    std::memcpy(codes, digit, quads * kQuad);
  } else {
    for (int quad = 0; quad < quads; ++quad) std::memcpy(codes + quad * rows * kQuad, digit + quad * kQuad, kQuad);
  }
}

// The usual case of quantize_segment(): one digit of 2 bits or more, no bit vectors, and whole vectors.
void quantize_vectors(const float* values, int count, int bits, const Slot& slot) {
  alignas(64) int8_t digit[kMaxSegment];
  const float step = step_of(largest_magnitude(values, count), bits);
  const int32_t total = round_to_digit(values, count, step, digit);
  store_quads(digit, count / kQuad, slot.rows, slot.codes);
  slot.scale[0] = step;
  slot.negative_sum[0] = -total;
  slot.sum[0] += step * static_cast<float>(total);
}

void quantize_segment(const float* values, int count, int bits, int digits, const Slot& slot) {
  if (digits == 1 && bits > 1 && !slot.planes && count % 16 == 0) return quantize_vectors(values, count, bits, slot);
  alignas(64) int32_t codes[kMaxSegment];
  alignas(64) int8_t digit[kMaxSegment];
  float step = step_of(bits == 1 ? mean_magnitude(values, count) : largest_magnitude(values, count), bits);
  if (bits == 1) {
    for (int i = 0; i < count; ++i) codes[i] = values[i] < 0 ? -1 : 1;
  } else {
    round_to_grid(values, count, step, codes);
  }
  const int quads = static_cast<int>(ceil_div(count, kQuad));
  for (int d = digits - 1; d >= 0; --d, step *= 256) {
    if (digits == 1) {
      for (int i = 0; i < count; ++i) digit[i] = static_cast<int8_t>(codes[i]);
    } else {
      lowest_digit(codes, count, digit);
    }
    std::memset(digit + count, 0, kMaxSegment - count);
    int32_t total = 0;
    for (int i = 0; i < count; ++i) total += digit[i];
    store_quads(digit, quads, slot.rows, slot.codes + d * kQuad);
    if (slot.planes) {
      const int64_t stride = static_cast<int64_t>(slot.rows) * slot.plane_count;
      cut_planes(digit, ceil_div(count, kWordColumns), bits == 1, slot.plane_count, stride, slot.planes + d * slot.plane_count);
    }
    slot.scale[d] = step;
    slot.negative_sum[d] = -total;
    slot.sum[d] += step * static_cast<float>(total);
  }
}

}  // namespace

void Activations::row(const ActivationSource& source, int64_t columns, int64_t index, float* values) {
  with_type(source.dtype, [&](auto* type) {
    const auto* x = static_cast<decltype(type)>(const_cast<void*>(source.data)) + index * columns;
    for (int64_t c = 0; c < columns; ++c) values[c] = static_cast<float>(x[c]);
    if (!source.norm_weight) return;
    const auto* weight = static_cast<decltype(type)>(const_cast<void*>(source.norm_weight));
    const float mean = static_cast<float>(sum_of_squares(values, columns) / static_cast<double>(columns));
    const float inverse = 1 / std::sqrt(mean + source.eps);
    for (int64_t c = 0; c < columns; ++c) values[c] = static_cast<float>(weight[c]) * (values[c] * inverse);
  });
}

Activations::Activations(const ActivationSource& source, const TiledLayout& layout, int bits, bool vectors)
    : bits_(bits), digits_(digits_of(bits)), rows_(source.rows), rows_per_block_(kActivationRows / digits_) {
  const int64_t total = rows_ * digits_, segments = segments_of(layout), count = ceil_div(rows_, rows_per_block_);
  codes_ = std::make_unique_for_overwrite<int8_t[]>(total * layout.quads * kQuad);
  scale_ = std::make_unique_for_overwrite<float[]>(total * segments);
  negative_sum_ = std::make_unique_for_overwrite<int32_t[]>(total * segments);
  sum_ = std::make_unique<float[]>(total * layout.groups);
  const int planes = vectors ? vectors_of(bits) : 0;
  if (vectors) planes_ = std::make_unique_for_overwrite<uint32_t[]>(total * layout.words * planes);
  blocks_.resize(count);
  for (int64_t b = 0; b < count; ++b) {
    const int64_t first = b * rows_per_block_ * digits_;
    blocks_[b] = {static_cast<int>(std::min(rows_per_block_ * digits_, total - first)),
                  codes_.get() + first * layout.quads * kQuad, scale_.get() + first * segments,
                  negative_sum_.get() + first * segments, sum_.get() + first * layout.groups,
                  planes_ ? planes_.get() + first * layout.words * planes : nullptr, planes};
  }
  std::mutex mutex;
  at::parallel_for(0, count, kGrain / (rows_per_block_ * layout.columns + 1) + 1, [&](int64_t begin, int64_t end) {
    std::vector<int64_t> bad;
    for (int64_t b = begin; b < end; ++b) quantize_block(source, layout, b, bad);
    if (bad.empty()) return;
    const std::lock_guard<std::mutex> lock(mutex);
    in_float_.insert(in_float_.end(), bad.begin(), bad.end());
  });
}

void Activations::quantize_block(const ActivationSource& source, const TiledLayout& layout, int64_t block,
                                 std::vector<int64_t>& bad) {
  const ActivationBlock& out = blocks_[block];
  const auto values = std::make_unique_for_overwrite<float[]>(layout.columns);
  const float* plain = source.dtype == Dtype::Float32 && !source.norm_weight ? static_cast<const float*>(source.data) : nullptr;
  for (int64_t r = 0; r < out.rows / digits_; ++r) {
    const int64_t index = block * rows_per_block_ + r;
    const float* x = plain ? plain + index * layout.columns : values.get();
    if (!plain) row(source, layout.columns, index, values.get());
    if (!is_moderate(x, layout.columns)) {
      bad.push_back(index);
      std::fill_n(values.get(), layout.columns, 0.0f);
      x = values.get();
    }
    int64_t quad = 0, word = 0, segment = 0;
    for (int64_t group = 0; group < layout.groups; ++group) {
      const int64_t end = std::min((group + 1) * layout.group_size, layout.columns);
      for (int64_t c = group * layout.group_size; c < end; c += kMaxSegment, ++segment) {
        const int count = static_cast<int>(std::min<int64_t>(kMaxSegment, end - c));
        const Slot slot{const_cast<int8_t*>(out.codes) + (quad * out.rows + r * digits_) * kQuad,
                        const_cast<float*>(out.scale) + segment * out.rows + r * digits_,
                        const_cast<int32_t*>(out.negative_sum) + segment * out.rows + r * digits_,
                        const_cast<float*>(out.sum) + group * out.rows + r * digits_, out.rows,
                        out.planes ? const_cast<uint32_t*>(out.planes) + (word * out.rows + r * digits_) * out.plane_count : nullptr,
                        out.plane_count};
        quantize_segment(x + c, count, bits_, digits_, slot);
        quad += ceil_div(count, kQuad);
        word += ceil_div(count, kWordColumns);
      }
    }
  }
}

bool Activations::fill_table(const Isa& isa, const TiledLayout& layout) {
  if (!isa.table_bytes || blocks_.size() != 1) return false;
  const int64_t bytes = isa.table_bytes(layout, blocks_[0].rows);
  if (!bytes) return false;
  table_ = std::make_unique_for_overwrite<uint8_t[]>(bytes + kCacheLine);
  const auto address = reinterpret_cast<uintptr_t>(table_.get());
  uint8_t* table = table_.get() + (kCacheLine - address % kCacheLine) % kCacheLine;
  isa.fill_table(layout, blocks_[0], table);
  blocks_[0].table = table;
  return true;
}

}  // namespace kbit::inline KBIT_LEVEL

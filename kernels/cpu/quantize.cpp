// Every operation rounds as PyTorch's does, so this file is compiled without fused multiply-add (build.py). Sums alone
// are taken in another order.
#include "quantize.h"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include <ATen/Parallel.h>

#include "vector.h"

namespace kbit::inline KBIT_LEVEL {
namespace {

constexpr int64_t kGrain = 1 << 12;  // weights worth handing to another thread
constexpr int64_t kRun = 64;         // terms summed before they join the total, to keep the rounding of long sums small

typedef int32_t Bits __attribute__((vector_size(4 * kLanes)));

// One value of each of kLanes groups. With a group per lane no sum crosses lanes, and grids are computed side by side.
struct alignas(64) Values {
  float lane[kLanes];
};

inline Vector splat(float value) { return Vector{} + value; }

// To float16 and back, ties to even; what is past float16's range, or no number, becomes an infinity.
inline Vector round_to_half(Vector v) {
  const Bits magnitude = (Bits)v & 0x7fffffff;
  const Bits sign = (Bits)v ^ magnitude;
  const Bits normal = (magnitude + 0xfff + ((magnitude >> 13) & 1)) & ~0x1fff;
  const Bits subnormal = (Bits)(((Vector)magnitude + 0.5f) - 0.5f);  // multiples of 2**-24, the ulp of 0.5
  const Bits finite = magnitude < 0x38800000 ? subnormal : normal;   // 2**-14
  return (Vector)((magnitude < 0x477ff000 ? finite : Bits{} + 0x7f800000) | sign);  // 65520 and up
}

// Codes that are their own levels.
class UniformLevels {
 public:
  explicit UniformLevels(const GridSearch& search)
      : highest_(static_cast<float>((1 << search.bits) - 1)),
        midpoint_(search.bits == 1 ? 0.5f : static_cast<float>(1 << (search.bits - 1))) {}

  float lowest() const { return 0; }
  float highest() const { return highest_; }
  float midpoint() const { return midpoint_; }

  // Adding 2**23 rounds to an integer, ties to even. Compared as bits, since compilers know the minimum of integers only.
  Vector nearest(Vector values) const {
    constexpr float kInteger = 1 << 23;
    const auto first = (Bits)splat(kInteger), last = (Bits)splat(kInteger + highest_);
    auto level = (Bits)(values + kInteger);
    level = level > first ? level : first;
    level = level < last ? level : last;
    return (Vector)level - kInteger;
  }

  uint8_t code(float level) const { return static_cast<uint8_t>(static_cast<int>(level)); }

 private:
  float highest_, midpoint_;
};

// Levels of a codebook. They are integers below 256, so the values half way between two of them are multiples of one half: a table
// of 512 entries tells the nearest of every value.
class CodebookLevels {
 public:
  explicit CodebookLevels(const GridSearch& search) {
    const uint8_t* levels = search.levels;
    const int last = (1 << search.bits) - 1;
    lowest_ = levels[0], highest_ = levels[last];
    for (int i = 0, code = 0; i < kHalves; ++i) {
      while (code < last && i >= levels[code] + levels[code + 1]) ++code;
      nearest_[i] = levels[code];
    }
    for (int code = 0; code <= last; ++code) codes_[levels[code]] = static_cast<uint8_t>(code);
  }

  float lowest() const { return lowest_; }
  float highest() const { return highest_; }
  float midpoint() const { return 128; }

  Vector nearest(Vector values) const {
    Vector half = values + values;
    half = half > 0.0f ? half : Vector{};
    half = half < kHalves - 1.0f ? half : splat(kHalves - 1);
    const Bits index = __builtin_convertvector(half, Bits);
    Vector levels;
    for (int lane = 0; lane < kLanes; ++lane) levels[lane] = nearest_[index[lane]];
    return levels;
  }

  uint8_t code(float level) const { return codes_[static_cast<int>(level)]; }

 private:
  static constexpr int kHalves = 512;
  float lowest_, highest_;
  float nearest_[kHalves];
  uint8_t codes_[256] = {};
};

// A grid for each lane, offset + scale * level, and what encoding on it takes.
struct Grid {
  Vector scale, offset, inverse, zero;
};

// The sum of f(0), ..., f(count - 1).
template <class F>
inline Vector sum(int64_t count, F&& f) {
  Vector total{};
  for (int64_t begin = 0; begin < count; begin += kRun) {
    const int64_t end = std::min(begin + kRun, count);
    Vector part{};
    for (int64_t i = begin; i < end; ++i) part += f(i);
    total += part;
  }
  return total;
}

// How much the squared error of value i of each group counts.
struct Alike {
  float operator()(int64_t) const { return 1; }
  void set(int64_t, int, float) {}
};

class ByColumn {
 public:
  explicit ByColumn(int64_t width) : weights_(width) {}
  Vector operator()(int64_t i) const { return load(weights_[i].lane); }
  void set(int64_t i, int lane, float weight) { weights_[i].lane[lane] = weight; }

 private:
  std::vector<Values> weights_;
};

// kLanes groups of `width` values and the search for their grids: quantizers/rtn.py and clip.py, line by line.
template <class Levels, class Importance>
class Groups {
 public:
  Groups(const Values* values, int64_t width, const GridSearch& search, const Levels& levels, const Importance& importance)
      : values_(values), width_(width), search_(search), levels_(levels), importance_(importance) {}

  Vector value(int64_t i) const { return load(values_[i].lane); }

  Vector encode(int64_t i, const Grid& grid) const { return levels_.nearest(value(i) * grid.inverse + grid.zero); }

  template <class Weights>
  Vector squared_error(const Grid& grid, const Weights& weights) const {
    return sum(width_, [&](int64_t i) {
      const Vector error = encode(i, grid) * grid.scale + grid.offset - value(i);
      return error * error * weights(i);
    });
  }

  Vector squared_norm() const {
    return sum(width_, [&](int64_t i) { return value(i) * value(i); });
  }

  // The grid with the least squared error, weighted by importance, of those tried.
  Grid find() const {
    const Grid full = full_range();
    Grid best = full;
    Vector error = squared_error(best, importance_);
    const double spread = search_.highest_shrink - search_.lowest_shrink;
    for (int step = 1; step < search_.candidates; ++step) {
      keep_better(shrunk(full, search_.highest_shrink - spread * step / (search_.candidates - 1)), best, error);
    }
    for (int fit = 0; fit < search_.refits; ++fit) keep_better(least_squares(best), best, error);
    return best;
  }

 private:
  // For a symmetric grid `offset` is not stored but follows from the scale. Its decoded values are exact either way.
  Grid grid(Vector scale, Vector offset) const {
    const Vector inverse = scale == 0.0f ? Vector{} : 1.0f / scale;
    if (search_.symmetric) return {scale, -levels_.midpoint() * scale, inverse, splat(levels_.midpoint())};
    return {scale, offset, inverse, -offset * inverse};
  }

  Grid full_range() const {
    Vector low = value(0), high = low;
    for (int64_t i = 1; i < width_; ++i) {
      low = value(i) < low ? value(i) : low;
      high = value(i) > high ? value(i) : high;
    }
    if (search_.symmetric) {
      return grid(round_to_half((-low > high ? low : high) / (levels_.lowest() - levels_.midpoint())), Vector{});
    }
    const Vector scale = round_to_half((high - low) / (levels_.highest() - levels_.lowest()));
    return grid(scale, round_to_half(low - scale * levels_.lowest()));
  }

  Grid shrunk(const Grid& full, double shrink) const {
    const float narrower = static_cast<float>(shrink);
    const float inwards = static_cast<float>((1 - shrink) * (levels_.lowest() + levels_.highest()) / 2);
    return grid(round_to_half(full.scale * narrower), round_to_half(full.offset + full.scale * inwards));
  }

  Grid least_squares(const Grid& old) const {
    Vector centre = splat(levels_.midpoint()), mean{};
    if (!search_.symmetric) {
      const Vector total = sum(width_, [&](int64_t i) { return Vector{} + importance_(i); });
      centre = sum(width_, [&](int64_t i) { return encode(i, old) * importance_(i); }) / total;
      mean = sum(width_, [&](int64_t i) { return value(i) * importance_(i); }) / total;
    }
    const Vector spread = sum(width_, [&](int64_t i) {
      const Vector distance = encode(i, old) - centre;
      return distance * distance * importance_(i);
    });
    const Vector moment =
        sum(width_, [&](int64_t i) { return (encode(i, old) - centre) * (value(i) - mean) * importance_(i); });
    const Vector fitted = round_to_half(spread > 0.0f ? moment / spread : old.scale);
    return grid(fitted, round_to_half(mean - fitted * centre));
  }

  void keep_better(const Grid& candidate, Grid& best, Vector& error) const {
    const Vector found = squared_error(candidate, importance_);
    const auto wins = found < error;
    error = wins ? found : error;
    best.scale = wins ? candidate.scale : best.scale;
    best.offset = wins ? candidate.offset : best.offset;
    best.inverse = wins ? candidate.inverse : best.inverse;
    best.zero = wins ? candidate.zero : best.zero;
  }

  const Values* values_;
  int64_t width_;
  const GridSearch& search_;
  const Levels& levels_;
  const Importance& importance_;
};

// Where one lane's group lies in the weight.
struct Place {
  int64_t row, element, grid;
};

// Quantizes groups of one width: `per_row` of them from column `first` on, in rows `begin` to `end`.
template <class T, class Levels, class Importance>
void quantize_groups(const T* weight, int64_t columns, int64_t begin, int64_t end, int64_t first, int64_t per_row,
                     int64_t width, const GridSearch& search, const Levels& levels, Importance importance,
                     const QuantizedRows& out) {
  const int64_t row_grids = (columns + search.group_size - 1) / search.group_size;
  const int64_t count = (end - begin) * per_row;
  const float inverse = 1.0f / search.global_scale;  // exact
  std::vector<Values> values(count ? width : 0);
  const Groups groups(values.data(), width, search, levels, importance);
  for (int64_t group = 0; group < count; group += kLanes) {
    const int lanes = static_cast<int>(std::min<int64_t>(kLanes, count - group));
    Place places[kLanes];
    for (int lane = 0; lane < lanes; ++lane) {
      const int64_t row = begin + (group + lane) / per_row;
      const int64_t column = first + (group + lane) % per_row * width;
      places[lane] = {row, row * columns + column, row * row_grids + column / search.group_size};
      const T* source = weight + places[lane].element;
      for (int64_t i = 0; i < width; ++i) values[i].lane[lane] = to_float(source[i]) * inverse;
      if (search.importance) {
        for (int64_t i = 0; i < width; ++i) importance.set(i, lane, search.importance[column + i]);
      }
    }  // lanes past the last group hold zeros or an earlier group, and are not read

    const Grid grid = groups.find();
    const Vector error = groups.squared_error(grid, Alike());
    const Vector norm = groups.squared_norm();
    for (int64_t i = 0; i < width; ++i) store(values[i].lane, groups.encode(i, grid));

    for (int lane = 0; lane < lanes; ++lane) {
      const Place& place = places[lane];
      uint8_t* codes = out.codes + place.element;
      for (int64_t i = 0; i < width; ++i) codes[i] = levels.code(values[i].lane[lane]);
      out.scale[place.grid] = grid.scale[lane];
      if (!search.symmetric) out.offset[place.grid] = grid.offset[lane];
      out.errors[2 * place.row] += error[lane];
      out.errors[2 * place.row + 1] += norm[lane];
    }
  }
}

template <class Levels>
void quantize_on(const Levels& levels, const void* weight, Dtype dtype, int64_t rows, int64_t columns,
                 const GridSearch& search, const QuantizedRows& out) {
  const int64_t whole = columns / search.group_size, rest = columns % search.group_size;
  with_type(dtype, [&](auto* type) {
    const auto* values = static_cast<decltype(type)>(const_cast<void*>(weight));
    at::parallel_for(0, rows, kGrain / (columns + 1) + 1, [&](int64_t begin, int64_t end) {
      const auto part = [&](int64_t first, int64_t per_row, int64_t width) {
        if (per_row == 0) return;
        if (search.importance) {
          quantize_groups(values, columns, begin, end, first, per_row, width, search, levels, ByColumn(width), out);
        } else {
          quantize_groups(values, columns, begin, end, first, per_row, width, search, levels, Alike(), out);
        }
      };
      part(0, whole, search.group_size);
      part(columns - rest, rest ? 1 : 0, rest);
    });
  });
}

}  // namespace

void quantize(const void* weight, Dtype dtype, int64_t rows, int64_t columns, const GridSearch& search,
              const QuantizedRows& out) {
  if (search.levels) return quantize_on(CodebookLevels(search), weight, dtype, rows, columns, search, out);
  quantize_on(UniformLevels(search), weight, dtype, rows, columns, search, out);
}

}  // namespace kbit::inline KBIT_LEVEL

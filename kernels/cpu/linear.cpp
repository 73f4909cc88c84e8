#include "linear.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include <ATen/Parallel.h>

#include "dequantize.h"
#include "unpack.h"
#include "vector.h"

namespace kbit {
namespace {

// Rows of x and rows of W in one register block; the accumulators must fit the 32 or 16 vector registers.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kMicroBatch = 4;
#else
constexpr int kMicroBatch = 2;
#endif
constexpr int kMicroRows = 4;

constexpr int64_t kTileRows = 4;        // rows of W dequantized at once
constexpr int64_t kTileColumns = 1024;  // of at most so many columns: 16 KiB of floats, half of the L1 cache
constexpr int64_t kBatchBlock = 128;    // rows of x that one dequantized tile serves

constexpr int64_t kGrain = 1 << 15;  // multiply-adds worth handing to another thread

// Adds halves, which is several times faster than what compilers make of a loop over the lanes.
template <int Lanes>
inline float lane_sum(typename VectorOf<Lanes>::type v) {
  if constexpr (Lanes == 2) {
    return v[0] + v[1];
  } else {
    typename VectorOf<Lanes / 2>::type half[2];
    std::memcpy(half, &v, sizeof v);
    return lane_sum<Lanes / 2>(half[0] + half[1]);
  }
}

// Not a power of two: rows 4 KiB apart would all compete for the same cache lines.
constexpr int64_t kTileStride = kTileColumns + 16;

// The part of the result that one task computes: kTileRows rows of W for kBatchBlock rows of x.
struct Tile {
  alignas(64) float weight[kTileRows][kTileStride];
  alignas(64) float sums[kBatchBlock][kTileRows];
};

// sums[b][r] += dot(x[b], weight[r]) over `columns`, for Batch rows of x and kMicroRows rows of the tile.
template <int Batch>
void dot(const float* x, int64_t x_stride, const float* weight, int64_t columns, float* sums) {
  Vector total[Batch][kMicroRows] = {};
  for (int64_t column = 0; column < columns; column += kLanes) {
    Vector w[kMicroRows];
    for (int row = 0; row < kMicroRows; ++row) w[row] = load(weight + row * kTileStride + column);
    for (int b = 0; b < Batch; ++b) {
      const Vector v = load(x + b * x_stride + column);
      for (int row = 0; row < kMicroRows; ++row) total[b][row] += v * w[row];
    }
  }
  for (int b = 0; b < Batch; ++b) {
    for (int row = 0; row < kMicroRows; ++row) sums[b * kTileRows + row] += lane_sum<kLanes>(total[b][row]);
  }
}

// The same for any number of rows of x and all rows of the tile.
void dot_tile(const float* x, int64_t x_stride, int64_t batch, int64_t columns, int64_t rows, Tile& tile) {
  for (int64_t row = 0; row < rows; row += kMicroRows) {
    int64_t b = 0;
    for (; b + kMicroBatch <= batch; b += kMicroBatch) {
      dot<kMicroBatch>(x + b * x_stride, x_stride, tile.weight[row], columns, &tile.sums[b][row]);
    }
    for (; b < batch; ++b) dot<1>(x + b * x_stride, x_stride, tile.weight[row], columns, &tile.sums[b][row]);
  }
}

struct Problem {
  const Weight& weight;
  const Dequantizer dequantize;
  const float* x;
  int64_t x_stride;
  int64_t batch;
  const float* bias;  // [N], or null
  void* y;
  Dtype dtype;

  // Computes y[batch_begin .. + batch_count, row_begin .. + rows].
  void compute(int64_t batch_begin, int64_t batch_count, int64_t row_begin, int64_t rows, Tile& tile) const {
    const int64_t passes = std::max<int64_t>(1, (x_stride + kTileColumns - 1) / kTileColumns);
    const int64_t step = std::max(kBlock, round_up((x_stride + passes - 1) / passes, kBlock));
    std::memset(tile.sums, 0, batch_count * sizeof tile.sums[0]);
    for (int64_t begin = 0; begin < x_stride; begin += step) {
      const int64_t end = std::min(begin + step, x_stride);
      for (int64_t row = 0; row < rows; ++row) dequantize(row_begin + row, begin, end, tile.weight[row]);
      dot_tile(x + batch_begin * x_stride + begin, x_stride, batch_count, end - begin, rows, tile);
    }
    with_type(dtype, [&](auto* type) { store(batch_begin, batch_count, row_begin, rows, tile, type); });
  }

  template <class T>
  void store(int64_t batch_begin, int64_t batch_count, int64_t row_begin, int64_t rows, const Tile& tile, T*) const {
    for (int64_t b = 0; b < batch_count; ++b) {
      T* out = static_cast<T*>(y) + (batch_begin + b) * weight.rows + row_begin;
      for (int64_t row = 0; row < rows; ++row) {
        const float sum = tile.sums[b][row] * weight.global_scale;
        out[row] = static_cast<T>(bias ? sum + bias[row_begin + row] : sum);
      }
    }
  }
};

std::vector<float> float_bias(const void* bias, Dtype dtype, int64_t rows) {
  std::vector<float> result(rows);
  with_type(dtype, [&](auto* type) {
    const auto* values = static_cast<decltype(type)>(const_cast<void*>(bias));
    for (int64_t row = 0; row < rows; ++row) result[row] = static_cast<float>(values[row]);
  });
  return result;
}

}  // namespace

int64_t padded_columns(int64_t columns) { return round_up(columns, kBlock); }

void pad_activations(const void* x, Dtype dtype, int64_t batch, int64_t columns, float* padded) {
  const int64_t stride = padded_columns(columns);
  with_type(dtype, [&](auto* type) {
    const auto* values = static_cast<decltype(type)>(const_cast<void*>(x));
    at::parallel_for(0, batch, kGrain / (stride + 1) + 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        const auto* source = values + b * columns;
        float* target = padded + b * stride;
        for (int64_t c = 0; c < columns; ++c) target[c] = static_cast<float>(source[c]);
        std::fill(target + columns, target + stride, 0.0f);
      }
    });
  });
}

void linear(const Weight& weight, const float* x, int64_t batch, const void* bias, Dtype bias_dtype, void* y,
            Dtype dtype) {
  const std::vector<float> bias_values = bias ? float_bias(bias, bias_dtype, weight.rows) : std::vector<float>{};
  const Problem problem{weight,  Dequantizer(weight), x, padded_columns(weight.columns), batch,
                        bias ? bias_values.data() : nullptr, y, dtype};
  const int64_t row_tiles = (weight.rows + kTileRows - 1) / kTileRows;
  const int64_t batch_tiles = (batch + kBatchBlock - 1) / kBatchBlock;
  const int64_t work = kTileRows * (problem.x_stride + 1) * std::min(batch, kBatchBlock);
  // Row tiles are innermost: the block of x stays in the L2 cache while the weight streams past.
  at::parallel_for(0, row_tiles * batch_tiles, kGrain / (work + 1) + 1, [&](int64_t begin, int64_t end) {
    Tile tile;
    std::memset(tile.weight, 0, sizeof tile.weight);  // the last tile may lack rows that `dot` still reads
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / row_tiles * kBatchBlock;
      const int64_t row = task % row_tiles * kTileRows;
      problem.compute(b, std::min(kBatchBlock, batch - b), row, std::min(kTileRows, weight.rows - row), tile);
    }
  });
}

}  // namespace kbit

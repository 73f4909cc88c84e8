#include "tiled_linear.h"

#include <algorithm>

#include <ATen/Parallel.h>

#include "cascade.h"
#include "dequantize.h"
#include "isa.h"

namespace kbit::inline KBIT_LEVEL {
namespace {

constexpr int64_t kGrain = 1 << 16;       // multiply-adds worth handing to another thread
constexpr int64_t kChunkBlocks = 8;       // blocks of x that one unpacked segment serves: their sums fit L1
constexpr int64_t kChunkRows = kChunkBlocks * kActivationRows;

// What is left to do with the sums of 16 rows of a weight, which are `scaled` if they have its global scale already.
class Epilogue {
 public:
  Epilogue(const TiledProblem& problem, int digits, bool scaled = false) : problem_(problem), digits_(digits), scaled_(scaled) {
    for (const TiledWeight& weight : problem.weights) width_ += weight.rows;
    if (problem.gated) width_ /= 2;
  }

  // Finishes `count` rows of x from `row` on and 16 columns of the result from `column` on: those of `weight`'s row block.
  // `gate` are the sums of the gate in a gated problem, `sums` those of what it gates. Both are overwritten.
  void store(int64_t row, int64_t count, int64_t row_block, size_t weight, int64_t column, float* sums, float* gate) const {
    const int64_t valid = std::min<int64_t>(kTileRows, problem_.weights[weight].rows - row_block * kTileRows);
    finish(sums, count, weight, bias_of(weight, row_block, valid));
    float* activated = gate ? gate : sums;
    if (gate) finish(gate, count, 0, bias_of(0, row_block, valid));
    apply(problem_.activation, activated, count * kTileRows);
    for (int64_t i = 0; gate && i < count * kTileRows; ++i) sums[i] *= gate[i];
    const int64_t at = row * width_ + column;
    if (problem_.residual.data) {
      with_type(problem_.residual.dtype, [&](auto* type) {
        const auto* residual = static_cast<const std::decay_t<decltype(*type)>*>(problem_.residual.data) + at;
        for (int64_t r = 0; r < count; ++r) add(residual + r * width_, valid, sums + r * kTileRows);
      });
    }
    with_type(problem_.y_dtype, [&](auto* type) {
      auto* out = static_cast<decltype(type)>(problem_.y) + at;
      for (int64_t r = 0; r < count; ++r) {
        write(sums + r * kTileRows, valid, out + r * width_);
        // The next row block writes behind these: rows of a wide result lie too far apart for the hardware to foresee it.
        if (count > 1) __builtin_prefetch(out + r * width_ + kTileRows, 1);
      }
    });
  }

 private:
  // The digits of each row are added up, then its scale and bias follow: [count][16].
  void finish(float* sums, int64_t count, size_t weight, const Floats& bias) const {
    const float scale = scaled_ ? 1.0f : problem_.weights[weight].global_scale;
    for (int64_t r = 0; r < count; ++r) {
      Floats total = read(sums + r * digits_ * kTileRows);
      for (int d = 1; d < digits_; ++d) total += read(sums + (r * digits_ + d) * kTileRows);
      total = total * scale + bias;
      std::memcpy(sums + r * kTileRows, &total, sizeof total);
    }
  }

  static Floats read(const float* values) {
    Floats v;
    std::memcpy(&v, values, sizeof v);
    return v;
  }

  template <class T>
  static void add(const T* residual, int64_t count, float* sums) {
    if (count == kTileRows) {  // known to the compiler, it is a vector
      for (int64_t i = 0; i < kTileRows; ++i) sums[i] += static_cast<float>(residual[i]);
    } else {
      for (int64_t i = 0; i < count; ++i) sums[i] += static_cast<float>(residual[i]);
    }
  }

  template <class T>
  static void write(const float* sums, int64_t count, T* out) {
    if (count == kTileRows) {
      for (int64_t i = 0; i < kTileRows; ++i) out[i] = static_cast<T>(sums[i]);
    } else {
      for (int64_t i = 0; i < count; ++i) out[i] = static_cast<T>(sums[i]);
    }
  }

  Floats bias_of(size_t weight, int64_t row_block, int64_t valid) const {
    alignas(64) float values[kTileRows] = {};
    const Addend& bias = problem_.biases[weight];
    if (bias.data) {
      with_type(bias.dtype, [&](auto* type) {
        const auto* source = static_cast<decltype(type)>(const_cast<void*>(bias.data)) + row_block * kTileRows;
        for (int64_t i = 0; i < valid; ++i) values[i] = static_cast<float>(source[i]);
      });
    }
    Floats result;
    std::memcpy(&result, values, sizeof result);
    return result;
  }

  const TiledProblem& problem_;
  int digits_;
  bool scaled_;
  int64_t width_ = 0;
};

// The row blocks of all weights in one row; a gate and what it gates go together.
struct Task {
  size_t weight;
  int64_t row_block, column;
};

Task task_of(const TiledProblem& problem, int64_t index) {
  if (problem.gated) return {1, index, index * kTileRows};
  int64_t column = 0;
  for (size_t w = 0;; ++w) {
    const TiledWeight& weight = problem.weights[w];
    if (index < weight.row_blocks) return {w, index, column + index * kTileRows};
    index -= weight.row_blocks;
    column += weight.rows;
  }
}

bool any_vectors(const TiledProblem& problem) {
  return std::any_of(problem.weights.begin(), problem.weights.end(), [](const TiledWeight& weight) { return weight.vectors; });
}

// A row of x that integers do not hold, as a float product gives it, with the global scale.
void float_row(const TiledWeight& weight, int64_t row_block, const float* x, float* sums) {
  std::vector<float> w(weight.columns);
  const int64_t valid = std::min<int64_t>(kTileRows, weight.rows - row_block * kTileRows);
  for (int64_t r = 0; r < valid; ++r) {
    dequantize_row(weight, row_block * kTileRows + r, w.data());
    double total = 0;
    for (int64_t c = 0; c < weight.columns; ++c) total += static_cast<double>(x[c]) * w[c];
    sums[r] = static_cast<float>(total * weight.global_scale);
  }
}

}  // namespace

int64_t row_blocks_of(const TiledProblem& problem) {
  if (problem.gated) return problem.weights.front().row_blocks;
  int64_t total = 0;
  for (const TiledWeight& weight : problem.weights) total += weight.row_blocks;
  return total;
}

const uint8_t* row_block_of(const TiledProblem& problem, int64_t index) {
  const Task task = task_of(problem, index);
  return problem.weights[problem.gated ? 0 : task.weight].block(task.row_block);
}

TiledProduct::TiledProduct(const TiledProblem& problem)
    : problem_(problem),
      x_(problem.x, problem.weights.front(), problem.activation_bits, any_vectors(problem)),
      row_blocks_(row_blocks_of(problem)) {
  for (const TiledWeight& weight : problem.weights) {
    if (!weight.vectors && x_.fill_table(isa(), weight)) break;  // one for all, as they share columns and groups
  }
  chunks_ = ceil_div(static_cast<int64_t>(x_.blocks().size()), kChunkBlocks);
}

int64_t TiledProduct::grain() const {
  const int64_t rows = std::min<int64_t>(x_.rows() * x_.digits(), kChunkRows);
  return kGrain / (kTileRows * (problem_.weights.front().columns + 1) * rows) + 1;
}

void TiledProduct::compute(int64_t begin, int64_t end) const {
  alignas(64) float sums[kChunkRows * kTileRows];
  alignas(64) float gate[kChunkRows * kTileRows];
  const Epilogue epilogue(problem_, x_.digits());
  CascadeBlock cascade;
  const auto dot = [&](const TiledWeight& weight, int64_t row_block, auto... rest) {
    if (weight.cascade) return isa().dot(cascade.of(weight, row_block), 0, rest...);
    (weight.vectors ? isa().bit_dot : isa().dot)(weight, row_block, rest...);
  };
  for (int64_t index = begin; index < end; ++index) {
    const int64_t first = index / row_blocks_ * kChunkBlocks;
    const int64_t count = std::min(kChunkBlocks, static_cast<int64_t>(x_.blocks().size()) - first);
    const Task task = task_of(problem_, index % row_blocks_);
    const ActivationBlock* blocks = x_.blocks().data() + first;
    dot(problem_.weights[task.weight], task.row_block, blocks, count, sums);
    if (problem_.gated) dot(problem_.weights[0], task.row_block, blocks, count, gate);
    const int64_t row = first * x_.rows_per_block();
    const int64_t rows = std::min(count * x_.rows_per_block(), x_.rows() - row);
    epilogue.store(row, rows, task.row_block, task.weight, task.column, sums, problem_.gated ? gate : nullptr);
  }
  for (const int64_t row : x_.in_float()) compute_in_float(row, begin, end);
}

// The results of that row among those of the tasks.
void TiledProduct::compute_in_float(int64_t row, int64_t begin, int64_t end) const {
  const Epilogue epilogue(problem_, x_.digits(), true);
  const int64_t columns = problem_.weights.front().columns, chunk = row / (kChunkBlocks * x_.rows_per_block());
  std::vector<float> values(columns);
  Activations::row(problem_.x, columns, row, values.data());
  alignas(64) float sums[3 * kTileRows] = {}, gate[3 * kTileRows] = {};
  begin = std::max(begin, chunk * row_blocks_), end = std::min(end, (chunk + 1) * row_blocks_);
  for (int64_t index = begin; index < end; ++index) {
    const Task task = task_of(problem_, index % row_blocks_);
    float_row(problem_.weights[task.weight], task.row_block, values.data(), sums);
    if (problem_.gated) float_row(problem_.weights[0], task.row_block, values.data(), gate);
    epilogue.store(row, 1, task.row_block, task.weight, task.column, sums, problem_.gated ? gate : nullptr);
  }
}

void tiled_linear(const TiledProblem& problem) {
  const TiledProduct product(problem);
  at::parallel_for(0, product.tasks(), product.grain(), [&](int64_t begin, int64_t end) { product.compute(begin, end); });
}

}  // namespace kbit::inline KBIT_LEVEL

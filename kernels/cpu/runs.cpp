#include "runs.h"

#include <algorithm>
#include <optional>

#include <ATen/Parallel.h>

#include "tiled_linear.h"

namespace kbit::inline KBIT_LEVEL {
namespace {

constexpr int64_t kQuantizeGrain = 1 << 14;  // values worth handing to another thread
constexpr int64_t kMultiplyGrain = 1 << 16;  // multiply-adds
constexpr int64_t kUnpackingCost = 6;        // of a task, in rows of x: measured with a weight of 4096 x 4096

int64_t bytes_of(Dtype dtype) { return dtype == Dtype::Float32 ? 4 : 2; }

TiledProblem problem_of(const ActivationSource& x, const Run& run, int activation_bits, void* y) {
  const int64_t bytes = bytes_of(x.dtype);
  TiledProblem problem;
  problem.x = x;
  problem.x.data = static_cast<const char*>(x.data) + run.first * run.weight.columns * bytes;
  problem.x.rows = run.rows;
  problem.weights = {run.weight};
  problem.biases = {Addend{}};
  problem.activation_bits = activation_bits;
  problem.y = static_cast<char*>(y) + run.first * run.weight.rows * bytes;
  problem.y_dtype = x.dtype;
  return problem;
}

// The tasks of a run among those of all, in units of work.
struct Span {
  int64_t begin, cost, tasks;

  int64_t end() const { return begin + cost * tasks; }
  // The first task that begins at `unit` or later.
  int64_t task_from(int64_t unit) const { return std::min(tasks, ceil_div(std::max<int64_t>(0, unit - begin), cost)); }
};

}  // namespace

void linear_of_runs(const ActivationSource& x, const std::vector<Run>& runs, int activation_bits, void* y) {
  const int64_t count = static_cast<int64_t>(runs.size());
  if (!count) return;
  std::vector<TiledProblem> problems;
  problems.reserve(count);
  int64_t rows = 0;
  for (const Run& run : runs) {
    problems.push_back(problem_of(x, run, activation_bits, y));
    rows += run.rows;
  }

  const int64_t columns = runs.front().weight.columns;
  std::vector<std::optional<TiledProduct>> products(count);
  at::parallel_for(0, count, kQuantizeGrain / (columns * ceil_div(rows, count) + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) products[i].emplace(problems[i]);
  });

  std::vector<Span> spans;
  spans.reserve(count);
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t tasks = products[i]->tasks(), chunks = std::max<int64_t>(1, tasks / std::max<int64_t>(1, runs[i].weight.row_blocks));
    spans.push_back({total, kUnpackingCost + ceil_div(runs[i].rows, chunks), tasks});
    total = spans.back().end();
  }
  at::parallel_for(0, total, kMultiplyGrain / (kTileRows * (columns + 1)) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t first = spans[i].task_from(begin), last = spans[i].task_from(end);
      if (first < last) products[i]->compute(first, last);
    }
  });
}

}  // namespace kbit::inline KBIT_LEVEL

// Few queries: the cache is read once, by as many tasks as keep all threads busy: runs of keys are attended to separately and combined
// by their maxima and sums, after Flash-Decoding (Dao et al., 2023).
#include "attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include <ATen/Parallel.h>

#include "activation.h"
#include "flash_attention.h"
#include "vector.h"

namespace kbit::inline KBIT_LEVEL {
namespace {

constexpr int64_t kFewQueries = 16;  // as many as a chain may have: it gives bit for bit what the operator does
constexpr int64_t kRun = 64;         // keys of one task, at least
constexpr int kLanes = 16;
constexpr float kNothing = -std::numeric_limits<float>::infinity();

template <class T>
void to_floats(const T* source, int64_t count, float* values) {
  for (int64_t i = 0; i < count; ++i) values[i] = static_cast<float>(source[i]);
}

// The row as floats: itself, or converted into `buffer`.
const float* float_row(const float* row, int64_t, float*) { return row; }
template <class T>
const float* float_row(const T* row, int64_t count, float* buffer) {
  to_floats(row, count, buffer);
  return buffer;
}

Floats load_floats(const float* values) {
  Floats v;
  std::memcpy(&v, values, sizeof v);
  return v;
}

float sum_of(Floats v) {
  const auto pair = fold<2, kLanes, float>(v);
  return pair[0] + pair[1];
}

// Rows of keys or values are taken four at a time, so that what is read or added up for them is so only once.
constexpr int kRows = 4;
using Rows = const float* [kRows];

// products[j] = a . rows[j]
void dots(const float* a, const Rows& rows, int64_t count, float* products) {
  Floats total[kRows] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Floats x = load_floats(a + i);
    for (int j = 0; j < kRows; ++j) total[j] += x * load_floats(rows[j] + i);
  }
  for (int j = 0; j < kRows; ++j) {
    const auto four = fold<4, kLanes, float>(total[j]);
    products[j] = (four[0] + four[1]) + (four[2] + four[3]);
    for (int64_t rest = i; rest < count; ++rest) products[j] += a[rest] * rows[j][rest];
  }
}

// total += sum of factors[j] * rows[j]
void add_scaled(const float* factors, const Rows& rows, int64_t count, float* total) {
  for (int64_t i = 0; i < count; ++i) {
    total[i] += (factors[0] * rows[0][i] + factors[1] * rows[1][i]) + (factors[2] * rows[2][i] + factors[3] * rows[3][i]);
  }
}

void add_scaled(float factor, const float* values, int64_t count, float* total) {
  for (int64_t i = 0; i < count; ++i) total[i] += factor * values[i];
}

// values[i] = exp(values[i] - largest); returns their sum.
float exponentials(float* values, int64_t count, float largest) {
  Floats total{};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Floats e = exp(load_floats(values + i) - largest);
    std::memcpy(values + i, &e, sizeof e);
    total += e;
  }
  float sum = sum_of(total);
  for (; i < count; ++i) sum += values[i] = std::exp(values[i] - largest);
  return sum;
}

using Part = AttentionPart;

// One key head and a run of keys, for all queries that look at it.
class Task {
 public:
  Task(const AttentionProblem& problem, int64_t index, int64_t runs, int64_t run_length) : p_(problem) {
    run_ = index % runs;
    const int64_t key_heads = p_.heads / p_.group;
    key_head_ = index / runs % key_heads;
    batch_ = index / runs / key_heads;
    begin_ = std::min(run_ * run_length, p_.length);
    end_ = std::min(begin_ + run_length, p_.length);
  }

  // parts [rows], values [rows][Dv]: rows are the queries of the heads of the group.
  template <class T>
  void compute(Part* parts, float* values, std::vector<float>& scratch) const {
    const int64_t rows = p_.group * p_.queries, count = end_ - begin_;
    const int64_t padded = round_up(count, kRows);
    scratch.resize(rows * (p_.size + padded) + kRows * std::max(p_.size, p_.value_size));
    float* queries = scratch.data();
    float* scores = queries + rows * p_.size;
    float* buffer = scores + rows * padded;
    for (int64_t row = 0; row < rows; ++row) {
      to_floats(at<T>(p_.q, p_.q_strides, head_of(row), row % p_.queries), p_.size, queries + row * p_.size);
    }
    Rows four;
    for (int64_t j = 0; j < count; j += kRows) {
      float_rows<T>(p_.k, p_.k_strides, j, p_.size, buffer, four);
      for (int64_t row = 0; row < rows; ++row) dots(queries + row * p_.size, four, p_.size, scores + row * padded + j);
    }
    for (int64_t row = 0; row < rows; ++row) {
      float* own = scores + row * padded;
      for (int64_t j = 0; j < count; ++j) own[j] *= p_.scale;
      add_mask<T>(row, own);
      finish_scores(own, count, parts[row]);
      std::fill(own + count, own + padded, 0.0f);
    }
    std::fill_n(values, rows * p_.value_size, 0.0f);
    for (int64_t j = 0; j < count; j += kRows) {
      float_rows<T>(p_.v, p_.v_strides, j, p_.value_size, buffer, four);
      for (int64_t row = 0; row < rows; ++row) {
        add_scaled(scores + row * padded + j, four, p_.value_size, values + row * p_.value_size);
      }
    }
  }

 private:
  int64_t head_of(int64_t row) const { return key_head_ * p_.group + row / p_.queries; }

  template <class T>
  const T* at(const void* data, const HeadStrides& strides, int64_t head, int64_t row) const {
    return static_cast<const T*>(data) + batch_ * strides.batch + head * strides.head + row * strides.row;
  }

  // Rows j .. j + 3 of the run, as floats; past its end the last one again, whose scores are then not used.
  template <class T>
  void float_rows(const void* data, const HeadStrides& strides, int64_t j, int64_t size, float* buffer, Rows& rows) const {
    for (int i = 0; i < kRows; ++i) {
      const T* row = at<T>(data, strides, key_head_, std::min(begin_ + j + i, end_ - 1));
      rows[i] = float_row(row, size, buffer + i * size);
    }
  }

  template <class T>
  void add_mask(int64_t row, float* scores) const {
    if (p_.causal) {
      const int64_t seen = std::clamp<int64_t>(row % p_.queries + 1 - begin_, 0, end_ - begin_);
      std::fill(scores + seen, scores + (end_ - begin_), kNothing);
    }
    if (p_.mask_type == MaskType::None) return;
    const int64_t offset = batch_ * p_.mask_strides.batch + head_of(row) * p_.mask_strides.head +
                           row % p_.queries * p_.mask_strides.row + begin_ * p_.mask_column;
    for (int64_t j = 0; j < end_ - begin_; ++j) {
      if (p_.mask_type == MaskType::Bool) {
        if (!static_cast<const bool*>(p_.mask)[offset + j * p_.mask_column]) scores[j] = kNothing;
      } else {
        scores[j] += static_cast<float>(static_cast<const T*>(p_.mask)[offset + j * p_.mask_column]);
      }
    }
  }

  static void finish_scores(float* scores, int64_t count, Part& part) {
    part = Part{};
    for (int64_t j = 0; j < count; ++j) {
      if (!(scores[j] <= part.largest)) part.largest = scores[j];  // a NaN stays
    }
    if (part.largest == kNothing) {
      std::fill_n(scores, count, 0.0f);
      return;
    }
    for (int64_t j = 0; j < count; ++j) {
      if (scores[j] == kNothing) scores[j] = part.largest - 200;  // the vector exp saturates before it reaches zero
    }
    part.sum = exponentials(scores, count, part.largest);
  }

  const AttentionProblem& p_;
  int64_t run_, key_head_, batch_, begin_, end_;
};

// The result of one query from the parts of all runs; `stride` parts lie between those of two runs.
template <class T>
void combine(const Part* parts, const float* values, int64_t runs, int64_t stride, int64_t size, T* out) {
  Part total;
  for (int64_t run = 0; run < runs; ++run) {
    if (!(parts[run * stride].largest <= total.largest)) total.largest = parts[run * stride].largest;
  }
  std::vector<float> sums(size);
  for (int64_t run = 0; run < runs; ++run) {
    const Part& part = parts[run * stride];
    const float factor = part.largest == kNothing ? 0 : std::exp(part.largest - total.largest);
    total.sum += factor * part.sum;
    add_scaled(factor, values + run * stride * size, size, sums.data());
  }
  for (int64_t i = 0; i < size; ++i) out[i] = static_cast<T>(total.sum == 0 ? 0 : sums[i] / total.sum);
}

}  // namespace

Attention::Attention(const AttentionProblem& problem, int64_t threads)
    : problem_(problem), pairs_(problem.batch * (problem.heads / problem.group)) {
  const int64_t wanted = std::max<int64_t>(1, 2 * threads / std::max<int64_t>(1, pairs_) + 1);
  runs_ = std::max<int64_t>(1, std::min(wanted, problem.length / kRun));
  run_length_ = (problem.length + runs_ - 1) / runs_;
  parts_.resize(runs_ * rows());
  values_.resize(runs_ * rows() * problem.value_size);
}

void Attention::compute(int64_t begin, int64_t end) {
  const int64_t rows = problem_.group * problem_.queries;
  with_type(problem_.dtype, [&](auto* type) {
    using T = std::decay_t<decltype(*type)>;
    std::vector<float> scratch;
    for (int64_t i = begin; i < end; ++i) {
      float* values = values_.data() + i * rows * problem_.value_size;
      Task(problem_, i, runs_, run_length_).compute<T>(&parts_[i * rows], values, scratch);
    }
  });
}

// Row (pair, query of the pair); a pair's queries are those of each head of its group.
void Attention::combine(int64_t begin, int64_t end) const {
  const int64_t size = problem_.value_size, queries = problem_.queries, rows = problem_.group * queries;
  with_type(problem_.dtype, [&](auto* type) {
    using T = std::decay_t<decltype(*type)>;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t pair = row / rows, own = row % rows;
      const int64_t batch = pair * problem_.group / problem_.heads, head = pair * problem_.group % problem_.heads + own / queries;
      T* out = static_cast<T*>(problem_.out) + ((batch * queries + own % queries) * problem_.heads + head) * size;
      const int64_t first = pair * runs_ * rows + own;
      kbit::combine(&parts_[first], values_.data() + first * size, runs_, rows, size, out);
    }
  });
}

void attention(const AttentionProblem& problem) {
  if (problem.queries > kFewQueries) return flash_attention(problem);
  Attention attention(problem, at::get_num_threads());
  at::parallel_for(0, attention.tasks(), 1, [&](int64_t begin, int64_t end) { attention.compute(begin, end); });
  attention.combine(0, attention.rows());
}

}  // namespace kbit::inline KBIT_LEVEL

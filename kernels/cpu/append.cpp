// Rotary position embedding (Su et al., "RoFormer", 2021) with the halves of a head turned against each other, as Llama has it.
#include "append.h"

#include <algorithm>

namespace kbit::inline KBIT_LEVEL {
namespace {

template <class T>
void turn(const T* x, const T* cos, const T* sin, int64_t size, T* __restrict out) {
  const int64_t half = size / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float a = to_float(x[i]), b = to_float(x[i + half]);
    out[i] = static_cast<T>(a * to_float(cos[i]) - b * to_float(sin[i]));
    out[i + half] = static_cast<T>(b * to_float(cos[i + half]) + a * to_float(sin[i + half]));
  }
}

template <class T>
void append_head(const AppendProblem& p, int64_t batch, int64_t query, int64_t head) {
  const int64_t row = batch * p.queries + query;
  const auto source = [row](const AppendProblem::Rows& rows) { return static_cast<const T*>(rows.data) + row * rows.stride; };
  const auto place = [batch, query](void* data, const HeadStrides& strides, int64_t head) {
    return static_cast<T*>(data) + batch * strides.batch + head * strides.head + query * strides.row;
  };
  const auto turned = [&](const T* x, T* out) {
    if (!p.cos) return void(std::copy_n(x, p.size, out));
    const T* cos = static_cast<const T*>(p.cos) + batch * p.cos_batch + query * p.size;
    const T* sin = static_cast<const T*>(p.sin) + batch * p.sin_batch + query * p.size;
    turn(x, cos, sin, p.size, out);
  };
  if (head < p.heads) {
    return turned(source(p.query) + head * p.size, static_cast<T*>(p.out) + (row * p.heads + head) * p.size);
  }
  head -= p.heads;
  if (head < p.key_heads) return turned(source(p.key) + head * p.size, place(p.keys, p.key_strides, head));
  head -= p.key_heads;
  std::copy_n(source(p.value) + head * p.value_size, p.value_size, place(p.values, p.value_strides, head));
}

}  // namespace

void append(const AppendProblem& problem, int64_t begin, int64_t end) {
  const int64_t heads = problem.heads + 2 * problem.key_heads;
  with_type(problem.dtype, [&](auto* type) {
    using T = std::decay_t<decltype(*type)>;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / heads;
      append_head<T>(problem, row / problem.queries, row % problem.queries, i % heads);
    }
  });
}

}  // namespace kbit::inline KBIT_LEVEL

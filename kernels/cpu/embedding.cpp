#include "embedding.h"

#include <algorithm>

#include <ATen/Parallel.h>

#include "dequantize.h"
#include "unpack.h"

namespace kbit {
namespace {

constexpr int64_t kRun = 16 * kBlock;  // columns dequantized at once: 4 KiB of floats
constexpr int64_t kGrain = 1 << 15;    // elements worth handing to another thread

template <class T>
void gather_row(const Weight& weight, const Dequantizer& dequantize, int64_t row, T* out) {
  alignas(64) float values[kRun];
  for (int64_t begin = 0; begin < weight.columns; begin += kRun) {
    const int64_t count = std::min(kRun, weight.columns - begin);
    dequantize(row, begin, begin + round_up(count, kBlock), values);
    for (int64_t i = 0; i < count; ++i) out[begin + i] = static_cast<T>(values[i] * weight.global_scale);
  }
}

}  // namespace

void embedding(const Weight& weight, const int64_t* indices, int64_t count, void* out, Dtype dtype) {
  const Dequantizer dequantize(weight);
  with_type(dtype, [&](auto* type) {
    auto* rows = static_cast<decltype(type)>(out);
    at::parallel_for(0, count, kGrain / (weight.columns + 1) + 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) gather_row(weight, dequantize, indices[i], rows + i * weight.columns);
    });
  });
}

}  // namespace kbit

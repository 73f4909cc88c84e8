// Packed rows to float32, a run of columns at a time.
#pragma once

#include <cstdint>

#include "weight.h"

namespace kbit {

// Dequantizes rows of one weight with the kernel for its bits and groups. Free of state: threads may share one.
class Dequantizer {
 public:
  using Kernel = void (*)(const Weight& weight, int64_t row, int64_t begin, int64_t end, float* out);

  explicit Dequantizer(const Weight& weight);

  // Columns `begin .. end` of `row`, without the global scale: out[c - begin] = scale * code + offset, rounded once.
  // Both ends are multiples of 64; columns past K come out finite but mean nothing.
  void operator()(int64_t row, int64_t begin, int64_t end, float* out) const { kernel_(weight_, row, begin, end, out); }

 private:
  const Weight& weight_;
  Kernel kernel_;
};

}  // namespace kbit

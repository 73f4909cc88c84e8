// The operators on the CPU whose weight is a batch of matrices [E, N, K], packed as uint8 [E, bytes]: the layout of one matrix, E times.
// Their schemas are defined in Python.

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/from_blob.h>
#include <torch/library.h>

#include "kernels.h"
#include "operands.h"
#include "packed_memory.h"

namespace kbit {
namespace {

using at::Tensor;

// The matrices [rows, columns] of a batch. The header of one is checked when it is asked for.
class Batch {
 public:
  Batch(const Tensor& packed, int64_t rows, int64_t columns) : packed_(packed), rows_(rows), columns_(columns) {
    TORCH_CHECK(packed.device().is_cpu() && packed.scalar_type() == at::kByte && packed.dim() == 2 && packed.is_contiguous(),
                "a packed batch of weights must be a contiguous uint8 matrix on the CPU, got ", packed.sizes(), " ",
                packed.scalar_type(), " on ", packed.device());
  }

  int64_t size() const { return packed_.size(0); }

  TiledWeight operator[](int64_t index) const {
    const TiledWeight weight = tiled_weight(packed_.const_data_ptr<uint8_t>() + index * packed_.size(1), packed_.size(1));
    TORCH_CHECK(weight.columns == columns_, "x has ", columns_, " columns, the packed weight ", weight.columns);
    TORCH_CHECK(weight.rows == rows_, "the packed weight has ", weight.rows, " rows, not ", rows_);
    return weight;
  }

 private:
  const Tensor& packed_;
  int64_t rows_, columns_;
};

void check_activations(const Tensor& x, int64_t dims, const char* shape) {
  TORCH_CHECK(x.dim() == dims && x.device().is_cpu(), "x must be a CPU tensor ", shape, ", got ", x.sizes(), " on ", x.device());
}

// Integers of a vector of `size`, as int64.
Tensor integers(const Tensor& tensor, const char* name, int64_t size) {
  const auto type = tensor.scalar_type();
  TORCH_CHECK(type == at::kLong || type == at::kInt, name, " must be int32 or int64, got ", type);
  TORCH_CHECK(tensor.device().is_cpu(), name, " must be on the CPU, got ", tensor.device());
  TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == size, name, " must have shape [", size, "], got ", tensor.sizes());
  return tensor.to(at::kLong).contiguous();
}

Tensor result_of(const Tensor& x, int64_t rows) {
  at::DimVector shape(x.sizes());
  shape.back() = rows;
  return at::empty(shape, x.options().memory_format(at::MemoryFormat::Contiguous));
}

void compute(const Tensor& x, const std::vector<Run>& runs, int64_t activation_bits, Tensor& y) {
  const Dtype dtype = dtype_of(x.scalar_type(), "x");
  const int bits = grid_bits(activation_bits, dtype);
  if (!y.numel()) return;
  kernels().linear_of_runs({x.const_data_ptr(), dtype, 0}, runs, bits, y.mutable_data_ptr());
}

// The matrix that each entry of `index` names, negative ones counted from the end.
std::vector<int64_t> matrices_of(const Tensor& index, int64_t entries, int64_t matrices) {
  const Tensor ids = integers(index, "index", entries);
  const auto* id = ids.const_data_ptr<int64_t>();
  std::vector<int64_t> found(id, id + entries);
  for (int64_t& matrix : found) {
    TORCH_CHECK_INDEX(matrix >= -matrices && matrix < matrices, "index ", matrix, " is out of range in a batch of ", matrices,
                      " matrices");
    if (matrix < 0) matrix += matrices;
  }
  return found;
}

// Positions of `values` in the order that sorts them, equal ones as they came.
std::vector<int64_t> sorting_order(const std::vector<int64_t>& values) {
  std::vector<int64_t> order(values.size());
  std::iota(order.begin(), order.end(), int64_t{0});
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return values[a] < values[b]; });
  return order;
}

// x[i] @ W[index[i]].T: entries of one matrix are brought together, so that each matrix is read once.
Tensor indexed_linear(const Tensor& x, const Batch& batch, const Tensor& index, int64_t rows, int64_t activation_bits) {
  const int64_t entries = x.size(0), height = x.size(1);
  const std::vector<int64_t> matrices = matrices_of(index, entries, batch.size());
  std::vector<int64_t> order = sorting_order(matrices);
  std::vector<Run> runs;
  for (int64_t begin = 0, end; begin < entries && height; begin = end) {
    const int64_t matrix = matrices[order[begin]];
    for (end = begin + 1; end < entries && matrices[order[end]] == matrix;) ++end;
    runs.push_back({begin * height, (end - begin) * height, batch[matrix]});
  }
  const bool sorted = std::is_sorted(order.begin(), order.end());
  const Tensor positions = at::from_blob(order.data(), {entries}, at::TensorOptions().dtype(at::kLong));
  const Tensor together = sorted ? x.contiguous() : x.index_select(0, positions).contiguous();
  Tensor y = result_of(x, rows);
  compute(together, runs, activation_bits, y);
  return sorted ? y : at::empty_like(y).index_copy_(0, positions, y);
}

Tensor batched_linear_cpu(const Tensor& x, const Tensor& weight, const OptionalTensor& index, int64_t rows,
                          int64_t activation_bits) {
  check_activations(x, 3, "[B, M, K]");
  const Batch batch(weight, rows, x.size(2));
  if (index) return indexed_linear(x, batch, *index, rows, activation_bits);
  TORCH_CHECK(x.size(0) == batch.size(), "x has a batch of ", x.size(0), ", the packed weight one of ", batch.size());
  std::vector<Run> runs;
  const int64_t height = x.size(1);
  for (int64_t i = 0; i < batch.size() && height; ++i) runs.push_back({i * height, height, batch[i]});
  Tensor y = result_of(x, rows);
  compute(x.contiguous(), runs, activation_bits, y);
  return y;
}

Tensor grouped_linear_cpu(const Tensor& x, const Tensor& weight, const Tensor& offsets, int64_t rows, int64_t activation_bits) {
  check_activations(x, 2, "[T, K]");
  const Batch batch(weight, rows, x.size(1));
  const Tensor ends = integers(offsets, "offsets", batch.size());
  const auto* end = ends.const_data_ptr<int64_t>();
  std::vector<Run> runs;
  int64_t begin = 0;
  for (int64_t i = 0; i < batch.size(); begin = end[i++]) {
    TORCH_CHECK_INDEX(begin <= end[i] && end[i] <= x.size(0), "offsets must ascend from 0 to at most the ", x.size(0),
                      " rows of x, got ", end[i], " after ", begin);
    if (begin < end[i]) runs.push_back({begin, end[i] - begin, batch[i]});
  }
  Tensor y = result_of(x, rows);
  compute(x.contiguous(), runs, activation_bits, y);
  y.narrow(0, begin, x.size(0) - begin).zero_();
  return y;
}

Tensor stack_cpu(const at::TensorList weights) {
  TORCH_CHECK(!weights.empty(), "a batch of packed weights needs one at least");
  const int64_t count = static_cast<int64_t>(weights.size()), nbytes = weights.front().numel();
  const Tensor packed = allocate_packed(count * nbytes);
  auto* bytes = packed.mutable_data_ptr<uint8_t>();
  for (const Tensor& weight : weights) {
    tiled_weight(weight);
    TORCH_CHECK(weight.numel() == nbytes, "packed weights of a batch must be of one size, got ", weight.numel(), " and ", nbytes);
    std::memcpy(bytes, weight.const_data_ptr(), nbytes);
    bytes += nbytes;
  }
  return packed.view({count, nbytes});
}

}  // namespace

TORCH_LIBRARY_IMPL(kbit, CPU, m) {
  m.impl("batched_linear_cpu", batched_linear_cpu);
  m.impl("grouped_linear_cpu", grouped_linear_cpu);
  m.impl("stack_cpu", stack_cpu);
}

}  // namespace kbit

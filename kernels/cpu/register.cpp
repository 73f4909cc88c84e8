// The kbit:: operators on the CPU: checks operands, then calls the kernels. The schemas are defined in Python.

#include <optional>
#include <tuple>

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "embedding.h"
#include "linear.h"
#include "quantize.h"

namespace kbit {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

Dtype dtype_of(at::ScalarType type, const char* what) {
  switch (type) {
    case at::kFloat: return Dtype::Float32;
    case at::kBFloat16: return Dtype::BFloat16;
    case at::kHalf: return Dtype::Float16;
    default: TORCH_CHECK(false, what, " must be float32, bfloat16 or float16, got ", type);
  }
}

// The operand in contiguous memory, once it is known to be what the kernel will read it as.
Tensor operand(const Tensor& tensor, const char* name, at::ScalarType type, at::IntArrayRef shape) {
  TORCH_CHECK(tensor.device().is_cpu(), name, " must be on the CPU, got ", tensor.device());
  TORCH_CHECK(tensor.scalar_type() == type, name, " must be ", type, ", got ", tensor.scalar_type());
  TORCH_CHECK(tensor.sizes() == shape, name, " must have shape ", shape, ", got ", tensor.sizes());
  return tensor.contiguous();
}

// Keeps the operands alive while the kernels read them through `view`.
struct Operands {
  Tensor planes, scale, offset, global_scale;
  Weight view;

  Operands(const Tensor& planes_, const Tensor& scale_, const OptionalTensor& offset_, const Tensor& global_scale_,
           int64_t columns, int64_t group_size) {
    TORCH_CHECK(group_size >= 1, "group_size must be at least 1, got ", group_size);
    TORCH_CHECK(columns >= 0, "embedding_dim must not be negative, got ", columns);
    TORCH_CHECK(planes_.dim() == 3 && planes_.size(0) >= 1 && planes_.size(0) <= 8,
                "planes must be [bits, N, ceil(K / 8)] with 1 to 8 bits, got ", planes_.sizes());
    view.bits = static_cast<int>(planes_.size(0));
    view.rows = planes_.size(1);
    view.columns = columns;
    view.group_size = group_size;
    planes = operand(planes_, "planes", at::kByte, {view.bits, view.rows, view.width()});
    scale = operand(scale_, "scale", at::kHalf, {view.rows, view.groups()});
    if (offset_) offset = operand(*offset_, "offset", at::kHalf, {view.rows, view.groups()});
    global_scale = operand(global_scale_, "global_scale", at::kFloat, {1});
    view.planes = planes.const_data_ptr<uint8_t>();
    view.scale = scale.const_data_ptr<at::Half>();
    view.offset = offset_ ? offset.const_data_ptr<at::Half>() : nullptr;
    view.global_scale = *global_scale.const_data_ptr<float>();
  }
};

Tensor linear_cpu(const Tensor& x, const Tensor& planes, const Tensor& scale, const OptionalTensor& offset,
                  const Tensor& global_scale, const OptionalTensor& bias, int64_t group_size) {
  TORCH_CHECK(x.dim() >= 1 && x.device().is_cpu(), "x must be a CPU tensor [..., K], got ", x.sizes(), " on ",
              x.device());
  const Dtype dtype = dtype_of(x.scalar_type(), "x");
  const int64_t columns = x.size(-1);
  const Operands weight(planes, scale, offset, global_scale, columns, group_size);
  const int64_t rows = weight.view.rows;

  Tensor bias_values;
  Dtype bias_dtype = Dtype::Float32;
  if (bias) {
    bias_dtype = dtype_of(bias->scalar_type(), "bias");
    bias_values = operand(*bias, "bias", bias->scalar_type(), {rows});
  }

  at::DimVector shape(x.sizes());
  shape.back() = rows;
  Tensor y = at::empty(shape, x.options().memory_format(at::MemoryFormat::Contiguous));
  if (y.numel() == 0) return y;

  const int64_t batch = y.numel() / rows;
  const Tensor source = x.contiguous();
  Tensor padded = source;
  if (dtype != Dtype::Float32 || columns != padded_columns(columns)) {
    padded = at::empty({batch, padded_columns(columns)}, x.options().dtype(at::kFloat));
    pad_activations(source.const_data_ptr(), dtype, batch, columns, padded.mutable_data_ptr<float>());
  }
  linear(weight.view, padded.const_data_ptr<float>(), batch, bias ? bias_values.const_data_ptr() : nullptr, bias_dtype,
         y.mutable_data_ptr(), dtype);
  return y;
}

Tensor embedding_cpu(const Tensor& indices, const Tensor& planes, const Tensor& scale, const OptionalTensor& offset,
                     const Tensor& global_scale, int64_t embedding_dim, int64_t group_size, at::ScalarType type) {
  const auto index_type = indices.scalar_type();
  TORCH_CHECK(index_type == at::kLong || index_type == at::kInt, "indices must be int32 or int64, got ", index_type);
  TORCH_CHECK(indices.device().is_cpu(), "indices must be on the CPU, got ", indices.device());
  const Dtype dtype = dtype_of(type, "dtype");
  const Operands table(planes, scale, offset, global_scale, embedding_dim, group_size);

  const Tensor rows = indices.to(at::kLong).contiguous();
  const int64_t* row = rows.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < rows.numel(); ++i) {
    TORCH_CHECK_INDEX(row[i] >= 0 && row[i] < table.view.rows, "index ", row[i], " is out of range in an embedding of ",
                      table.view.rows, " rows");
  }

  at::DimVector shape(indices.sizes());
  shape.push_back(embedding_dim);
  Tensor out = at::empty(shape, planes.options().dtype(type).memory_format(at::MemoryFormat::Contiguous));
  embedding(table.view, row, rows.numel(), out.mutable_data_ptr(), dtype);
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> quantize_cpu(const Tensor& weight, double global_scale, int64_t bits,
                                                        int64_t group_size, bool symmetric, double lowest_shrink,
                                                        int64_t candidates) {
  TORCH_CHECK(weight.dim() == 2, "weight must be a matrix [N, K], got ", weight.sizes());
  TORCH_CHECK(bits >= 1 && bits <= 8, "bits must be 1 to 8, got ", bits);
  TORCH_CHECK(group_size >= 1, "group_size must be at least 1, got ", group_size);
  TORCH_CHECK(candidates >= 0 && candidates <= 1000, "candidates must be 0 to 1000, got ", candidates);
  const Dtype dtype = dtype_of(weight.scalar_type(), "weight");
  const int64_t rows = weight.size(0), columns = weight.size(1);
  const int64_t groups = columns / group_size + (columns % group_size != 0);
  const Tensor source = weight.contiguous();
  const Tensor codes = at::empty({rows, columns}, source.options().dtype(at::kByte));
  const Tensor scale = at::empty({rows, groups}, source.options().dtype(at::kHalf));
  const Tensor offset = at::empty({symmetric ? 0 : rows, groups}, source.options().dtype(at::kHalf));
  const Tensor errors = at::zeros({rows, 2}, source.options().dtype(at::kDouble));
  const GridSearch search{static_cast<int>(bits), group_size, symmetric, static_cast<float>(global_scale),
                          lowest_shrink, static_cast<int>(candidates)};
  quantize(source.const_data_ptr(), dtype, rows, columns, search,
           {codes.mutable_data_ptr<uint8_t>(), scale.mutable_data_ptr<at::Half>(), offset.mutable_data_ptr<at::Half>(),
            errors.mutable_data_ptr<double>()});
  return {codes, scale, offset, errors};
}

Tensor pack_codes_cpu(const Tensor& codes, int64_t bits) {
  TORCH_CHECK(codes.dim() == 2, "codes must be a matrix [N, K], got ", codes.sizes());
  TORCH_CHECK(bits >= 1 && bits <= 8, "bits must be 1 to 8, got ", bits);
  const Tensor source = operand(codes, "codes", at::kByte, codes.sizes());
  const int64_t rows = codes.size(0), columns = codes.size(1);
  const Tensor planes = at::empty({bits, rows, (columns + 7) / 8}, source.options());
  pack_codes(source.const_data_ptr<uint8_t>(), rows, columns, static_cast<int>(bits), planes.mutable_data_ptr<uint8_t>());
  return planes;
}

}  // namespace

TORCH_LIBRARY_IMPL(kbit, CPU, m) {
  m.impl("linear_cpu", linear_cpu);
  m.impl("embedding_cpu", embedding_cpu);
  m.impl("quantize_cpu", quantize_cpu);
  m.impl("pack_codes_cpu", pack_codes_cpu);
}

}  // namespace kbit

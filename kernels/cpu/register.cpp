// The kbit:: operators on the CPU: checks operands, then calls the kernels. The schemas are defined in Python.

#include <cstddef>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <c10/util/hash.h>
#include <torch/library.h>

#include "calls.h"
#include "isa.h"
#include "kernels.h"
#include "operands.h"
#include "packed_memory.h"

namespace kbit {
namespace {

using at::Tensor;

Tensor linear_cpu(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, int64_t rows, int64_t activation_bits) {
  Product product(x, activation_bits);
  product.weight(weight, rows, bias);
  return product.compute();
}

Tensor fused_linear_cpu(const Tensor& x, const OptionalTensor& norm_weight, double eps, const at::TensorList weights,
                        const c10::List<OptionalTensor>& biases, at::IntArrayRef rows, std::string_view activation, bool gated,
                        const OptionalTensor& residual, int64_t activation_bits, std::optional<at::ScalarType> dtype) {
  TORCH_CHECK(!weights.empty() && weights.size() == biases.size() && weights.size() == rows.size(),
              "weights, biases and rows must be lists of the same length, at least 1");
  Product product(x, activation_bits);
  if (norm_weight) product.norm(*norm_weight, eps);
  for (size_t i = 0; i < weights.size(); ++i) product.weight(weights[i], rows[i], biases.get(i));
  product.activation(activation, gated);
  if (residual) product.residual(*residual);
  if (dtype) product.result_dtype(*dtype);
  return product.compute();
}

Tensor embedding_cpu(const Tensor& indices, const Tensor& packed, int64_t embedding_dim, at::ScalarType type) {
  const auto index_type = indices.scalar_type();
  TORCH_CHECK(index_type == at::kLong || index_type == at::kInt, "indices must be int32 or int64, got ", index_type);
  TORCH_CHECK(indices.device().is_cpu(), "indices must be on the CPU, got ", indices.device());
  const Dtype dtype = dtype_of(type, "dtype");
  const TiledWeight table = tiled_weight(packed);
  TORCH_CHECK(table.columns == embedding_dim, "the packed table has ", table.columns, " columns, not ", embedding_dim);

  const Tensor rows = indices.to(at::kLong).contiguous();
  const int64_t* row = rows.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < rows.numel(); ++i) {
    TORCH_CHECK_INDEX(row[i] >= 0 && row[i] < table.rows, "index ", row[i], " is out of range in an embedding of ",
                      table.rows, " rows");
  }

  at::DimVector shape(indices.sizes());
  shape.push_back(embedding_dim);
  Tensor out = at::empty(shape, packed.options().dtype(type).memory_format(at::MemoryFormat::Contiguous));
  tiled_embedding(table, row, rows.numel(), out.mutable_data_ptr(), dtype);
  return out;
}

Tensor dequantize_cpu(const Tensor& packed, int64_t begin, int64_t end) {
  const TiledWeight weight = tiled_weight(packed);
  TORCH_CHECK(begin >= 0 && begin <= end && end <= weight.rows, "rows ", begin, " to ", end, " are not among the ", weight.rows);
  Tensor out = at::empty({end - begin, weight.columns}, packed.options().dtype(at::kFloat));
  tiled_dequantize(weight, begin, end, out.mutable_data_ptr<float>());
  return out;
}

// Memory for a weight whose rows are yet to be written: header, levels and tail are.
Tensor empty_tiled_cpu(int64_t rows, int64_t columns, const Tensor& global_scale, int64_t bits, int64_t group_size,
                       bool symmetric, const OptionalTensor& codebook, bool vectors, bool cascade) {
  TORCH_CHECK(!codebook || !vectors, "bit vectors hold codes, not levels: give no codebook");
  TORCH_CHECK(!cascade || !(codebook || vectors), "a cascade has neither a codebook nor bit vectors");
  TORCH_CHECK(rows >= 0 && columns >= 0, "a weight cannot be ", rows, " x ", columns);
  TORCH_CHECK(bits >= 1 && bits <= 8, "bits must be 1 to 8, got ", bits);
  TORCH_CHECK(group_size >= 1 && group_size < kMaxSize, "group_size must be at least 1, got ", group_size);
  const TiledLayout layout(static_cast<int>(bits), symmetric, rows, columns, group_size, codebook.has_value(), vectors, cascade);
  const Tensor factor = operand(global_scale, "global_scale", at::kFloat, {1});
  const Tensor levels = codebook ? codebook_operand(*codebook, bits) : Tensor();
  Tensor packed = allocate_packed(layout.nbytes());
  auto* bytes = packed.mutable_data_ptr<uint8_t>();
  std::memset(bytes, 0, kHeaderBytes + layout.codebook_bytes());
  std::memset(bytes + layout.nbytes() - kTailBytes, 0, kTailBytes);
  const TiledHeader header{kMagic, static_cast<uint8_t>(bits), layout.symmetric, layout.codebook, layout.vectors,
                           *factor.const_data_ptr<float>(), cascade, 0, 0, layout.rows, layout.columns, layout.group_size};
  std::memcpy(bytes, &header, sizeof header);
  if (codebook) std::memcpy(bytes + kHeaderBytes, levels.const_data_ptr(), levels.numel());
  return packed;
}

// The rows of whole blocks from `begin` to `end` as a weight of their own.
TiledWeight rows_of(TiledWeight weight, int64_t begin, int64_t end) {
  TORCH_CHECK(begin >= 0 && begin <= end && end <= weight.rows, "rows ", begin, " to ", end, " are not among the ", weight.rows);
  TORCH_CHECK(begin % kTileRows == 0 && (end % kTileRows == 0 || end == weight.rows), "rows ", begin, " to ", end,
              " are no whole blocks of ", kTileRows);
  weight.data = weight.block(begin / kTileRows);
  weight.rows = end - begin;
  weight.row_blocks = ceil_div(weight.rows, kTileRows);
  return weight;
}

// Shape of the scales and of the offsets of a weight.
at::DimVector grid_shape(const TiledLayout& layout) {
  at::DimVector shape{layout.rows, layout.groups};
  if (layout.cascade) shape.insert(shape.begin(), layout.bits);
  return shape;
}

void tile_rows_cpu(const Tensor& packed, int64_t begin, const Tensor& codes, const Tensor& scale, const OptionalTensor& offset) {
  TORCH_CHECK(codes.dim() == 2, "codes must be a matrix [N, K], got ", codes.sizes());
  const TiledWeight rows = rows_of(tiled_weight(packed), begin, begin + codes.size(0));
  TORCH_CHECK(rows.symmetric == !offset, "a symmetric grid has no offset, and every other has");
  const Tensor source = operand(codes, "codes", at::kByte, {rows.rows, rows.columns});
  const at::DimVector grid = grid_shape(rows);
  const Tensor steps = operand(scale, "scale", at::kHalf, grid);
  const Tensor zeros = offset ? operand(*offset, "offset", at::kHalf, grid) : Tensor();
  auto* bytes = packed.mutable_data_ptr<uint8_t>();
  tile(rows, source.const_data_ptr<uint8_t>(), reinterpret_cast<const uint16_t*>(steps.const_data_ptr()),
       offset ? reinterpret_cast<const uint16_t*>(zeros.const_data_ptr()) : nullptr, bytes + (rows.data - bytes));
}

Tensor tile_cpu(const Tensor& codes, const Tensor& scale, const OptionalTensor& offset, const Tensor& global_scale,
                int64_t bits, int64_t group_size, const OptionalTensor& codebook, bool vectors, bool cascade) {
  TORCH_CHECK(codes.dim() == 2, "codes must be a matrix [N, K], got ", codes.sizes());
  const Tensor packed =
      empty_tiled_cpu(codes.size(0), codes.size(1), global_scale, bits, group_size, !offset, codebook, vectors, cascade);
  tile_rows_cpu(packed, 0, codes, scale, offset);
  return packed;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> untile_cpu(const Tensor& packed, int64_t begin, std::optional<int64_t> end) {
  TiledWeight weight = tiled_weight(packed);
  weight = rows_of(weight, begin, end.value_or(weight.rows));
  const Tensor codes = at::empty({weight.rows, weight.columns}, packed.options());
  const Tensor scale = at::empty(grid_shape(weight), packed.options().dtype(at::kHalf));
  at::DimVector offset_shape = grid_shape(weight);
  if (weight.symmetric) offset_shape[0] = 0;
  const Tensor offset = at::empty(offset_shape, scale.options());
  const Tensor global_scale = at::full({1}, weight.global_scale, packed.options().dtype(at::kFloat));
  for (int grid = 0; grid < weight.grids(); ++grid) {  // the last of them leaves the codes of all planes
    weight.planes = grid + 1;
    const int64_t first = grid * weight.rows * weight.groups;
    untile(weight, codes.mutable_data_ptr<uint8_t>(), reinterpret_cast<uint16_t*>(scale.mutable_data_ptr()) + first,
           weight.symmetric ? nullptr : reinterpret_cast<uint16_t*>(offset.mutable_data_ptr()) + first);
  }
  const Tensor codebook = at::empty({weight.codebook ? 1 << weight.bits : 0}, packed.options());
  if (weight.codebook) std::memcpy(codebook.mutable_data_ptr(), weight.levels, codebook.numel());
  return {codes, scale, offset, global_scale, codebook};
}

// A number that changes when one of `tensors` becomes another tensor, gets another storage or layout, or is written to.
int64_t fingerprint(const at::TensorList tensors) {
  size_t hash = tensors.size();
  for (const Tensor& tensor : tensors) {
    hash = c10::hash_combine(hash, reinterpret_cast<size_t>(tensor.unsafeGetTensorImpl()));
    hash = c10::hash_combine(hash, reinterpret_cast<size_t>(tensor.storage().unsafeGetStorageImpl()));
    hash = c10::hash_combine(hash, tensor.is_inference() ? 0 : static_cast<size_t>(tensor._version()) + 1);
    hash = c10::hash_combine(hash, static_cast<size_t>(tensor.storage_offset()));
    for (const int64_t extent : tensor.sizes()) hash = c10::hash_combine(hash, static_cast<size_t>(extent));
    for (const int64_t stride : tensor.strides()) hash = c10::hash_combine(hash, static_cast<size_t>(stride));
  }
  return static_cast<int64_t>(hash);
}

int64_t set_precision_cpu(int64_t bits) {
  TORCH_CHECK(bits >= 0 && bits <= 8, "bits must be 1 to 8, or 0 for all, got ", bits);
  return set_precision(static_cast<int>(bits));
}

// The same for one weight, whoever reads it. It is no change of the weight, so no version is counted.
int64_t limit_planes_cpu(const Tensor& packed, int64_t bits) {
  const TiledWeight weight = tiled_weight(packed);
  TORCH_CHECK(weight.cascade, "this weight is no cascade");
  TORCH_CHECK(bits >= 0 && bits <= weight.bits, "bits must be 1 to ", weight.bits, ", or 0 for all, got ", bits);
  auto* bytes = static_cast<uint8_t*>(const_cast<void*>(packed.const_data_ptr()));
  return std::exchange(bytes[offsetof(TiledHeader, limit)], static_cast<uint8_t>(bits));
}

std::string isa_cpu() { return isa().name; }

std::vector<std::string> isas_cpu() {
  std::vector<std::string> names;
  for (const IsaEntry& entry : isas()) {
    if (entry.usable) names.emplace_back(entry.isa->name);
  }
  return names;
}

void force_isa_cpu(std::string_view name) {
  TORCH_CHECK(force_isa(std::string(name).c_str()), "this machine does not run the instruction set '", std::string(name), "'");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> quantize_cpu(const Tensor& weight, double global_scale, int64_t bits,
                                                        int64_t group_size, bool symmetric, double lowest_shrink,
                                                        double highest_shrink, int64_t candidates,
                                                        const OptionalTensor& codebook, const OptionalTensor& importance,
                                                        int64_t refits) {
  TORCH_CHECK(weight.dim() == 2, "weight must be a matrix [N, K], got ", weight.sizes());
  TORCH_CHECK(bits >= 1 && bits <= 8, "bits must be 1 to 8, got ", bits);
  TORCH_CHECK(group_size >= 1, "group_size must be at least 1, got ", group_size);
  TORCH_CHECK(candidates >= 0 && candidates <= 1000, "candidates must be 0 to 1000, got ", candidates);
  TORCH_CHECK(refits >= 0 && refits <= 1000, "refits must be 0 to 1000, got ", refits);
  const Dtype dtype = dtype_of(weight.scalar_type(), "weight");
  const int64_t rows = weight.size(0), columns = weight.size(1);
  const int64_t groups = columns / group_size + (columns % group_size != 0);
  const Tensor source = weight.contiguous();
  const Tensor codes = at::empty({rows, columns}, source.options().dtype(at::kByte));
  const Tensor scale = at::empty({rows, groups}, source.options().dtype(at::kHalf));
  const Tensor offset = at::empty({symmetric ? 0 : rows, groups}, source.options().dtype(at::kHalf));
  const Tensor errors = at::zeros({rows, 2}, source.options().dtype(at::kDouble));
  const Tensor levels = codebook ? codebook_operand(*codebook, bits) : Tensor();
  TORCH_CHECK(!importance || (importance->scalar_type() == at::kFloat && importance->sizes() == at::IntArrayRef({columns})),
              "importance must be float32 [K]");
  const Tensor weights = importance ? importance->contiguous() : Tensor();
  const GridSearch search{static_cast<int>(bits), group_size, symmetric, static_cast<float>(global_scale), lowest_shrink,
                          highest_shrink, static_cast<int>(candidates), static_cast<int>(refits),
                          codebook ? levels.const_data_ptr<uint8_t>() : nullptr,
                          importance ? weights.const_data_ptr<float>() : nullptr};
  kernels().quantize(source.const_data_ptr(), dtype, rows, columns, search,
           {codes.mutable_data_ptr<uint8_t>(), scale.mutable_data_ptr<at::Half>(), offset.mutable_data_ptr<at::Half>(),
            errors.mutable_data_ptr<double>()});
  return {codes, scale, offset, errors};
}

}  // namespace

TORCH_LIBRARY_IMPL(kbit, CompositeImplicitAutograd, m) {
  m.impl("fingerprint", fingerprint);
  m.impl("set_precision_cpu", set_precision_cpu);
  m.impl("limit_planes_cpu", limit_planes_cpu);
  m.impl("empty_tiled_cpu", empty_tiled_cpu);
  m.impl("isa_cpu", isa_cpu);
  m.impl("isas_cpu", isas_cpu);
  m.impl("force_isa_cpu", force_isa_cpu);
}

// Without derivatives of their own, operators would pass through a fallback that costs as much as a small product.
TORCH_LIBRARY_IMPL(kbit, Autograd, m) {
  for (const char* name : {"fused_linear_cpu", "embedding_cpu"}) {
    m.impl(name, torch::CppFunction::makeFallthrough());
  }
}

TORCH_LIBRARY_IMPL(kbit, CPU, m) {
  m.impl("linear_cpu", linear_cpu);
  m.impl("fused_linear_cpu", fused_linear_cpu);
  m.impl("embedding_cpu", embedding_cpu);
  m.impl("dequantize_cpu", dequantize_cpu);
  m.impl("tile_cpu", tile_cpu);
  m.impl("tile_rows_cpu", tile_rows_cpu);
  m.impl("untile_cpu", untile_cpu);
  m.impl("quantize_cpu", quantize_cpu);
}

}  // namespace kbit
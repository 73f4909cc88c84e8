// The calls of kernels that operators and chains share: operands checked, and kept alive while the kernels read them.
#pragma once

#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include "kernels.h"
#include "operands.h"

namespace kbit {

// `into`, if it is given and fits, or new memory for a result [shape] of `type`.
inline at::Tensor result_of(at::IntArrayRef shape, at::ScalarType type, const OptionalTensor& into) {
  if (!into) return at::empty(shape, at::TensorOptions(type));
  TORCH_CHECK(into->numel() == c10::multiply_integers(shape) && into->scalar_type() == type && into->is_contiguous() &&
                  into->device().is_cpu(),
              "a result ", shape, " of ", type, " does not go into a tensor ", into->sizes(), " of ", into->scalar_type());
  return into->view(shape);
}

// Operands of a product, checked, and kept alive while the kernels read them.
class Product {
 public:
  Product(const at::Tensor& x, int64_t activation_bits) {
    TORCH_CHECK(x.dim() >= 1 && x.device().is_cpu(), "x must be a CPU tensor [..., K], got ", x.sizes(), " on ", x.device());
    x_ = x.contiguous();
    columns_ = x.size(-1);
    problem_.x.dtype = dtype_of(x.scalar_type(), "x");
    problem_.x.data = x_.const_data_ptr();
    result_dtype(x.scalar_type());
    problem_.activation_bits = grid_bits(activation_bits, problem_.x.dtype);
  }

  void norm(const at::Tensor& weight, double eps) {
    problem_.x.norm_weight = keep(operand(weight, "norm_weight", x_.scalar_type(), {columns_}));
    problem_.x.eps = static_cast<float>(eps);
  }

  void weight(const at::Tensor& packed, int64_t rows, const OptionalTensor& bias) {
    const TiledWeight weight = tiled_weight(packed);
    TORCH_CHECK(weight.columns == columns_, "x has ", columns_, " columns, the packed weight ", weight.columns);
    TORCH_CHECK(weight.rows == rows, "the packed weight has ", weight.rows, " rows, not ", rows);
    if (!problem_.weights.empty()) {
      TORCH_CHECK(weight.group_size == problem_.weights.front().group_size, "weights of one product must share a group size");
    }
    problem_.weights.push_back(weight);
    problem_.biases.push_back(bias ? addend(*bias, "bias", {rows}) : Addend());
    rows_ += rows;
  }

  void activation(std::string_view name, bool gated) {
    TORCH_CHECK(parse_activation(name, problem_.activation), "activation '", std::string(name), "' is unknown");
    problem_.gated = gated;
    if (!gated) return;
    TORCH_CHECK(problem_.weights.size() == 2 && problem_.weights[0].rows == problem_.weights[1].rows,
                "a gated product takes two weights of the same rows");
    rows_ /= 2;
  }

  void residual(const at::Tensor& residual) { problem_.residual = addend(residual, "residual", shape()); }

  // That of the result, which is that of x unless another is given.
  void result_dtype(at::ScalarType type) {
    problem_.y_dtype = dtype_of(type, "dtype");
    result_type_ = type;
  }

  // The result, which whoever computes problem() fills. It may be empty: then there is nothing to compute.
  at::Tensor result(const OptionalTensor& into = {}) {
    at::Tensor y = result_of(shape(), result_type_, into);
    problem_.x.rows = y.numel() ? y.numel() / rows_ : 0;
    problem_.y = y.mutable_data_ptr();
    return y;
  }

  const TiledProblem& problem() const { return problem_; }

  at::Tensor compute() {
    at::Tensor y = result();
    if (y.numel()) kernels().tiled_linear(problem_);
    return y;
  }

 private:
  at::DimVector shape() const {
    at::DimVector shape(x_.sizes());
    shape.back() = rows_;
    return shape;
  }

  Addend addend(const at::Tensor& tensor, const char* name, at::IntArrayRef shape) {
    const Dtype dtype = dtype_of(tensor.scalar_type(), name);
    return {keep(operand(tensor, name, tensor.scalar_type(), shape)), dtype};
  }

  const void* keep(at::Tensor tensor) {
    kept_.push_back(std::move(tensor));
    return kept_.back().const_data_ptr();
  }

  at::Tensor x_;
  int64_t columns_ = 0, rows_ = 0;
  at::ScalarType result_type_;
  std::vector<at::Tensor> kept_;
  TiledProblem problem_;
};

inline HeadStrides strides_of(const at::Tensor& tensor) { return {tensor.stride(0), tensor.stride(1), tensor.stride(2)}; }

// [B, H, rows, columns] whose rows lie in one piece each.
inline at::Tensor heads(const at::Tensor& tensor, const char* name, at::ScalarType type) {
  TORCH_CHECK(tensor.device().is_cpu() && tensor.dim() == 4 && tensor.scalar_type() == type, name,
              " must be a CPU tensor [B, H, L, D] of ", type, ", got ", tensor.sizes(), " of ", tensor.scalar_type());
  return tensor.stride(3) == 1 || tensor.size(3) <= 1 ? tensor : tensor.contiguous();
}

// Operands of an attention, checked, and kept alive while the kernels read them.
class AttentionCall {
 public:
  AttentionCall(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const OptionalTensor& mask, double scale,
                bool causal = false) {
    const at::ScalarType type = query.scalar_type();
    AttentionProblem& p = problem_;
    p.dtype = dtype_of(type, "query");
    q_ = heads(query, "query", type), k_ = heads(key, "key", type), v_ = heads(value, "value", type);
    p.batch = q_.size(0), p.heads = q_.size(1), p.queries = q_.size(2), p.size = q_.size(3);
    p.length = k_.size(2), p.value_size = v_.size(3);
    TORCH_CHECK(k_.size(0) == p.batch && v_.size(0) == p.batch && k_.size(3) == p.size && v_.size(1) == k_.size(1) &&
                    v_.size(2) == p.length,
                "query ", q_.sizes(), ", key ", k_.sizes(), " and value ", v_.sizes(), " do not fit together");
    TORCH_CHECK(p.heads == 0 || (k_.size(1) > 0 && p.heads % k_.size(1) == 0), "the ", p.heads,
                " heads of query are no multiple of the ", k_.size(1), " of key");
    p.group = p.heads ? p.heads / k_.size(1) : 1;
    if (mask) add_mask(*mask, type);
    p.q = q_.const_data_ptr(), p.k = k_.const_data_ptr(), p.v = v_.const_data_ptr();
    p.q_strides = strides_of(q_), p.k_strides = strides_of(k_), p.v_strides = strides_of(v_);
    p.scale = static_cast<float>(scale);
    p.causal = causal;
  }

  // [B, M, H, Dv], which whoever computes problem() fills. It may be empty: then there is nothing to compute.
  at::Tensor result(const OptionalTensor& into = {}) {
    const AttentionProblem& p = problem_;
    at::Tensor out = result_of({p.batch, p.queries, p.heads, p.value_size}, q_.scalar_type(), into);
    problem_.out = out.mutable_data_ptr();
    return out;
  }

  const AttentionProblem& problem() const { return problem_; }

 private:
  void add_mask(const at::Tensor& mask, at::ScalarType type) {
    AttentionProblem& p = problem_;
    TORCH_CHECK(mask.device().is_cpu() && (mask.scalar_type() == at::kBool || mask.scalar_type() == type),
                "mask must be bool or of the dtype of query, got ", mask.scalar_type());
    mask_ = mask.expand({p.batch, p.heads, p.queries, p.length});
    p.mask_type = mask.scalar_type() == at::kBool ? MaskType::Bool : MaskType::Like;
    p.mask = mask_.const_data_ptr();
    p.mask_strides = strides_of(mask_);
    p.mask_column = mask_.stride(3);
  }

  at::Tensor q_, k_, v_, mask_;
  AttentionProblem problem_;
};

// New keys and values of `x [B, M, columns]`, from the columns named on, for caches [B, H', L, D] that have room from `start` on.
class AppendCall {
 public:
  struct Source {
    const at::Tensor& rows;
    int64_t column;
  };

  AppendCall(const Source& query, const Source& key, const Source& value, const OptionalTensor& cos, const OptionalTensor& sin,
             const at::Tensor& keys, const at::Tensor& values, int64_t start, int64_t heads) {
    const at::ScalarType type = query.rows.scalar_type();
    AppendProblem& p = problem_;
    p.dtype = dtype_of(type, "query");
    const Cache k(keys, "keys", type), v(values, "values", type);
    TORCH_CHECK(query.rows.dim() == 3 && heads >= 0 && heads < kMaxSize, "query must be [B, M, columns], got ", query.rows.sizes());
    p.batch = query.rows.size(0), p.queries = query.rows.size(1), p.heads = heads;
    p.key_heads = keys.size(1), p.size = keys.size(3), p.value_size = values.size(3);
    TORCH_CHECK(keys.size(0) == p.batch && values.size(0) == p.batch && values.size(1) == p.key_heads && values.size(2) == keys.size(2),
                "caches ", keys.sizes(), " and ", values.sizes(), " do not fit ", p.batch, " sequences");
    TORCH_CHECK(start >= 0 && start <= keys.size(2) && p.queries <= keys.size(2) - start, "a cache of ", keys.size(2),
                " tokens has no room for ", p.queries, " more after ", start);
    end_ = start + p.queries;
    p.query = rows(query, p.heads * p.size, type), p.key = rows(key, p.key_heads * p.size, type);
    p.value = rows(value, p.key_heads * p.value_size, type);
    p.keys = k.at(start), p.values = v.at(start);
    p.key_strides = strides_of(keys), p.value_strides = strides_of(values);
    TORCH_CHECK(cos.has_value() == sin.has_value() && (!cos || p.size % 2 == 0), "give both cos and sin, and heads of even size");
    if (cos) p.cos = angles(*cos, type, p.cos_batch), p.sin = angles(*sin, type, p.sin_batch);
  }

  // The queries [B, H, M, D], which whoever computes problem() fills.
  at::Tensor result() {
    const AppendProblem& p = problem_;
    at::Tensor out = result_of({p.batch, p.queries, p.heads, p.size}, kept_.front().scalar_type(), {});
    problem_.out = out.mutable_data_ptr();
    return out.transpose(1, 2);
  }

  int64_t end() const { return end_; }  // how many tokens a cache holds then
  const AppendProblem& problem() const { return problem_; }

 private:
  struct Cache {
    const at::Tensor& tensor;
    Cache(const at::Tensor& cache, const char* name, at::ScalarType type) : tensor(cache) {
      TORCH_CHECK(cache.device().is_cpu() && cache.dim() == 4 && cache.scalar_type() == type && (cache.stride(3) == 1 || cache.size(3) <= 1),
                  name, " must be a CPU tensor [B, H, L, D] of ", type, " whose rows lie in one piece each, got ", cache.sizes(), " of ",
                  cache.scalar_type());
    }
    void* at(int64_t row) const {
      return static_cast<char*>(tensor.mutable_data_ptr()) + row * tensor.stride(2) * static_cast<int64_t>(tensor.element_size());
    }
  };

  AppendProblem::Rows rows(const Source& source, int64_t columns, at::ScalarType type) {
    const at::Tensor& x = source.rows;
    const AppendProblem& p = problem_;
    TORCH_CHECK(x.device().is_cpu() && x.dim() == 3 && x.scalar_type() == type && x.size(0) == p.batch && x.size(1) == p.queries,
                "query, key and value must be CPU tensors [B, M, columns] of one dtype, got ", x.sizes(), " of ", x.scalar_type());
    TORCH_CHECK(source.column >= 0 && source.column <= x.size(2) && columns <= x.size(2) - source.column, "columns ", source.column,
                " to ", source.column + columns, " are not among the ", x.size(2));
    kept_.push_back(x.contiguous());
    const auto* data = static_cast<const char*>(kept_.back().const_data_ptr());
    return {data + source.column * static_cast<int64_t>(x.element_size()), x.size(2)};
  }

  const void* angles(const at::Tensor& tensor, at::ScalarType type, int64_t& stride) {
    const AppendProblem& p = problem_;
    TORCH_CHECK(tensor.device().is_cpu() && tensor.dim() == 3 && tensor.scalar_type() == type && tensor.size(1) == p.queries &&
                    tensor.size(2) == p.size && (tensor.size(0) == 1 || tensor.size(0) == p.batch),
                "cos and sin must be CPU tensors [B or 1, M, D] of ", type, ", got ", tensor.sizes(), " of ", tensor.scalar_type());
    kept_.push_back(tensor.contiguous());
    stride = tensor.size(0) == 1 ? 0 : p.queries * p.size;
    return kept_.back().const_data_ptr();
  }

  std::vector<at::Tensor> kept_;
  int64_t end_;
  AppendProblem problem_;
};

}  // namespace kbit

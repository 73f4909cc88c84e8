// The operators of a decoding step, one by one and in chains: see lowering/chain.py. Their schemas are defined in Python.

#include <iterator>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "calls.h"

namespace kbit {
namespace {

using at::Tensor;

Tensor attention_cpu(const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& mask, double scale,
                     bool causal) {
  AttentionCall call(query, key, value, mask, scale, causal);
  Tensor out = call.result();
  if (out.numel()) kernels().attention(call.problem());
  return out.transpose(1, 2);
}

// Reads the steps of a chain: see lowering/chain.py, which writes them.
class ChainReader {
 public:
  // `written`: the results, then caches. Without it results are allocated, and there are no caches.
  ChainReader(const at::TensorList inputs, std::optional<at::TensorList> written, at::IntArrayRef starts, at::IntArrayRef program,
              at::ArrayRef<double> numbers, const c10::List<std::string>& activations)
      : values_(inputs.begin(), inputs.end()), starts_(starts), program_(program), numbers_(numbers), activations_(activations) {
    TORCH_CHECK(numbers.size() == activations.size(), "a chain has a number and an activation for each step");
    first_cache_ = values_.size();
    if (written) {
      const int64_t results = next();
      TORCH_CHECK(results >= 0 && results <= static_cast<int64_t>(written->size()), "a chain cannot write ", results, " results");
      places_.assign(written->begin(), written->begin() + results);
      values_.insert(values_.end(), written->begin() + results, written->end());
    }
    end_of_caches_ = values_.size();
    allocates_ = !written;
    for (size_t step = 0; step < numbers.size(); ++step) read_step(step);
    TORCH_CHECK(at_ == program_.size(), "the program of a chain is longer than its steps");
    TORCH_CHECK(allocates_ || results_.size() == places_.size(), "a chain gives ", results_.size(), " results, not ", places_.size());
    TORCH_CHECK(start_ == starts_.size(), "a chain has a start for each step that appends to a cache");
  }

  const std::vector<ChainStep>& steps() const { return steps_; }
  std::vector<Tensor> results() && { return std::move(results_); }

 private:
  int64_t next() {
    TORCH_CHECK(at_ < program_.size(), "the program of a chain ends within a step");
    return program_[at_++];
  }

  // An input of the chain or the result of an earlier step.
  const Tensor& tensor(int64_t index) const {
    TORCH_CHECK(index >= 0 && index < static_cast<int64_t>(values_.size()), "a step of a chain reads a value that is not there");
    return values_[index];
  }
  OptionalTensor optional() {
    const int64_t index = next();
    return index < 0 ? OptionalTensor() : OptionalTensor(tensor(index));
  }

  void read_step(size_t step) {
    const int64_t kind = next();
    const bool returned = next();
    if (kind == kAppend) return read_append();
    OptionalTensor into;
    if (returned && !allocates_) {
      TORCH_CHECK(results_.size() < places_.size(), "a chain gives more results than there is room for");
      into = places_[results_.size()];
    }
    Tensor result = kind == kProduct ? read_product(step, into) : read_attention(step, into);
    if (returned) results_.push_back(result);
    values_.push_back(std::move(result));
  }

  Tensor read_product(size_t step, const OptionalTensor& into) {
    const Tensor& x = tensor(next());
    Product product(x, next());
    if (const OptionalTensor norm = optional()) product.norm(*norm, numbers_[step]);
    const OptionalTensor residual = optional();
    const bool gated = next();
    const int64_t dtype = next(), count = next();
    TORCH_CHECK(count >= 1, "a product needs a weight");
    for (int64_t i = 0; i < count; ++i) {
      const Tensor& weight = tensor(next());
      const OptionalTensor bias = optional();
      product.weight(weight, next(), bias);
    }
    product.activation(std::string(activations_.get(step)), gated);
    if (residual) product.residual(*residual);
    if (dtype >= 0) {
      TORCH_CHECK(dtype < static_cast<int64_t>(std::size(kDtypes)), "a product of a chain gives a dtype that is none");
      product.result_dtype(kDtypes[dtype]);
    }
    Tensor result = product.result(into);
    products_.push_back(std::move(product));
    if (result.numel()) steps_.emplace_back(products_.back().problem());
    return result;
  }

  Tensor read_attention(size_t step, const OptionalTensor& into) {
    const Tensor &query = tensor(next()), &key = tensor(next()), &value = tensor(next());
    const OptionalTensor mask = optional();
    AttentionCall call(query, key, value, mask, numbers_[step]);
    Tensor result = call.result(into);
    attentions_.push_back(std::move(call));
    if (result.numel()) steps_.emplace_back(attentions_.back().problem());
    return result.flatten(2);
  }

  // Its results are three: the turned queries, and what the caches hold then.
  void read_append() {
    const auto source = [this] {
      const Tensor& rows = tensor(next());
      return AppendCall::Source{rows, next()};
    };
    const auto query = source(), key = source(), value = source();
    const OptionalTensor cos = optional(), sin = optional();
    const Tensor &keys = cache(next()), &values = cache(next());
    TORCH_CHECK(start_ < starts_.size(), "a chain has a start for each step that appends to a cache");
    AppendCall call(query, key, value, cos, sin, keys, values, starts_[start_++], next());
    std::vector<Tensor> given{call.result(), keys.narrow(2, 0, call.end()), values.narrow(2, 0, call.end())};
    appends_.push_back(std::move(call));
    if (appends_.back().problem().tasks()) steps_.emplace_back(appends_.back().problem());
    values_.insert(values_.end(), given.begin(), given.end());
  }

  // What a step may write to.
  const Tensor& cache(int64_t index) const {
    TORCH_CHECK(index >= static_cast<int64_t>(first_cache_) && index < static_cast<int64_t>(end_of_caches_),
                "a step of a chain appends to what is no cache");
    return values_[index];
  }

  static constexpr int64_t kProduct = 1, kAppend = 2;  // anything else is attention
  static constexpr at::ScalarType kDtypes[] = {at::kFloat, at::kBFloat16, at::kHalf};

  std::vector<Tensor> values_, results_, places_;
  size_t first_cache_, end_of_caches_, start_ = 0;
  bool allocates_ = true;
  at::IntArrayRef starts_;
  at::IntArrayRef program_;
  at::ArrayRef<double> numbers_;
  const c10::List<std::string>& activations_;
  size_t at_ = 0;
  std::vector<Product> products_;
  std::vector<AttentionCall> attentions_;
  std::vector<AppendCall> appends_;
  std::vector<ChainStep> steps_;
};

std::vector<Tensor> chain_cpu(const at::TensorList inputs, at::IntArrayRef program, at::ArrayRef<double> numbers,
                              const c10::List<std::string>& activations) {
  ChainReader reader(inputs, std::nullopt, {}, program, numbers, activations);
  kernels().run_chain(reader.steps());
  return std::move(reader).results();
}

void caching_chain_cpu(const at::TensorList inputs, const at::TensorList written, at::IntArrayRef starts, at::IntArrayRef program,
                       at::ArrayRef<double> numbers, const c10::List<std::string>& activations) {
  const ChainReader reader(inputs, written, starts, program, numbers, activations);
  kernels().run_chain(reader.steps());
}

Tensor append_cpu(const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& cos, const OptionalTensor& sin,
                  const Tensor& keys, const Tensor& values, int64_t start, at::IntArrayRef columns, int64_t heads) {
  TORCH_CHECK(columns.size() == 3, "columns must be those of query, key and value");
  AppendCall call({query, columns[0]}, {key, columns[1]}, {value, columns[2]}, cos, sin, keys, values, start, heads);
  Tensor out = call.result();
  kernels().append(call.problem(), 0, call.problem().tasks());
  return out;
}

}  // namespace

// Without derivatives of their own, operators would pass through a fallback that costs as much as a small product.
TORCH_LIBRARY_IMPL(kbit, Autograd, m) {
  for (const char* name : {"attention_cpu", "append_cpu", "chain_cpu", "caching_chain_cpu"}) {
    m.impl(name, torch::CppFunction::makeFallthrough());
  }
}

TORCH_LIBRARY_IMPL(kbit, CPU, m) {
  m.impl("attention_cpu", attention_cpu);
  m.impl("append_cpu", append_cpu);
  m.impl("chain_cpu", chain_cpu);
  m.impl("caching_chain_cpu", caching_chain_cpu);
}

}  // namespace kbit

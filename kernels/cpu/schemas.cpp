// Schemas of the operators that an exported model calls, for programs without Python. Python defines them with all others, before it
// loads this library (lowering/cpu.py); a test holds the two to each other.

#include <string>

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

namespace kbit {

TORCH_LIBRARY_FRAGMENT(kbit, m) {
  for (const std::string& schema : std::initializer_list<std::string>{
           "linear_cpu(Tensor x, Tensor weight, Tensor? bias, int rows, int activation_bits) -> Tensor",
           "fused_linear_cpu(Tensor x, Tensor? norm_weight, float eps, Tensor[] weights, Tensor?[] biases, int[] rows, str activation, "
           "bool gated, Tensor? residual, int activation_bits, ScalarType? dtype=None) -> Tensor",
           "attention_cpu(Tensor query, Tensor key, Tensor value, Tensor? mask, float scale, bool causal=False) -> Tensor",
           "embedding_cpu(Tensor indices, Tensor weight, int embedding_dim, ScalarType dtype) -> Tensor",
       }) {
    const c10::OperatorName name("kbit::" + schema.substr(0, schema.find('(')), "");
    if (!c10::Dispatcher::singleton().findSchema(name)) m.def(schema.c_str(), {at::Tag::pt2_compliant_tag});
  }
}

}  // namespace kbit

#include "operands.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include <c10/util/Exception.h>

namespace kbit {

using at::Tensor;

namespace {
thread_local int precision = 0;
}

Dtype dtype_of(at::ScalarType type, const char* what) {
  switch (type) {
    case at::kFloat: return Dtype::Float32;
    case at::kBFloat16: return Dtype::BFloat16;
    case at::kHalf: return Dtype::Float16;
    default: TORCH_CHECK(false, what, " must be float32, bfloat16 or float16, got ", type);
  }
}

Tensor operand(const Tensor& tensor, const char* name, at::ScalarType type, at::IntArrayRef shape) {
  TORCH_CHECK(tensor.device().is_cpu(), name, " must be on the CPU, got ", tensor.device());
  TORCH_CHECK(tensor.scalar_type() == type, name, " must be ", type, ", got ", tensor.scalar_type());
  TORCH_CHECK(tensor.sizes() == shape, name, " must have shape ", shape, ", got ", tensor.sizes());
  return tensor.contiguous();
}

Tensor codebook_operand(const Tensor& codebook, int64_t bits) {
  TORCH_CHECK(takes_codebook(static_cast<int>(bits)), "codebooks are of 2 to 7 bits, got ", bits);
  const Tensor levels = operand(codebook, "codebook", at::kByte, {int64_t{1} << bits});
  const auto* level = levels.const_data_ptr<uint8_t>();
  for (int64_t i = 1; i < levels.numel(); ++i) TORCH_CHECK(level[i - 1] < level[i], "codebook must ascend");
  return levels;
}

int set_precision(int bits) { return std::exchange(precision, bits); }

TiledWeight tiled_weight(const Tensor& packed) {
  TORCH_CHECK(packed.device().is_cpu() && packed.scalar_type() == at::kByte && packed.dim() == 1 && packed.is_contiguous(),
              "a packed weight must be a contiguous uint8 vector on the CPU, got ", packed.sizes(), " ",
              packed.scalar_type(), " on ", packed.device());
  return tiled_weight(packed.const_data_ptr<uint8_t>(), packed.numel());
}

TiledWeight tiled_weight(const uint8_t* bytes, int64_t nbytes) {
  TORCH_CHECK(nbytes >= kHeaderBytes + kTailBytes, "a packed weight of ", nbytes, " bytes has no header");
  TiledHeader header;
  std::memcpy(&header, bytes, sizeof header);
  TORCH_CHECK(header.magic == kMagic, "this is no packed weight: it does not begin with KBT1");
  TORCH_CHECK(header.bits >= 1 && header.bits <= 8 && header.symmetric <= 1 && header.codebook <= 1 && header.vectors <= 1 &&
                  header.cascade <= 1 && header.limit <= header.bits && !(header.cascade && (header.codebook || header.vectors)) &&
                  (!header.codebook || (takes_codebook(header.bits) && !header.vectors)) && header.rows >= 0 &&
                  header.rows < kMaxSize && header.columns >= 0 && header.columns < kMaxSize && header.group_size >= 1 &&
                  header.group_size < kMaxSize,
              "the header of the packed weight is damaged");
  TiledWeight weight;
  static_cast<TiledLayout&>(weight) =
      TiledLayout(header.bits, header.symmetric, header.rows, header.columns, header.group_size, header.codebook,
                  header.vectors, header.cascade);
  // Divided, since the product of what a header may say can wrap around.
  TORCH_CHECK(!weight.block_bytes || weight.row_blocks <= nbytes / weight.block_bytes, "a packed weight of ", weight.rows,
              " x ", weight.columns, " takes more than ", nbytes, " bytes");
  TORCH_CHECK(nbytes == weight.nbytes(), "a packed weight of ", weight.rows, " x ", weight.columns, " takes ",
              weight.nbytes(), " bytes, got ", nbytes);
  if (weight.codebook) weight.levels = bytes + kHeaderBytes;
  weight.data = bytes + kHeaderBytes + weight.codebook_bytes();
  weight.global_scale = header.global_scale;
  if (weight.cascade) {
    weight.planes = std::min<int>(header.limit ? header.limit : weight.bits, precision ? precision : weight.bits);
  }
  return weight;
}

int grid_bits(int64_t activation_bits, Dtype dtype) {
  TORCH_CHECK((activation_bits >= 1 && activation_bits <= 8) || activation_bits == 16,
              "activation_bits must be 1 to 8, or 16, got ", activation_bits);
  return activation_bits == 16 && dtype == Dtype::Float32 ? 24 : static_cast<int>(activation_bits);
}

}  // namespace kbit

// Memory for packed weights: aligned to cache lines, and on huge pages where the system gives them.
#pragma once

#include <ATen/core/Tensor.h>

namespace kbit {

// A uint8 tensor [nbytes]. Small weights share chunks of huge pages; a chunk is freed with the last weight in it.
at::Tensor allocate_packed(int64_t nbytes);

}  // namespace kbit

#include "kernels.h"

namespace kbit::inline KBIT_LEVEL {

const Kernels kKernels{tiled_linear, attention, append, run_chain, linear_of_runs, quantize};

}  // namespace kbit::inline KBIT_LEVEL

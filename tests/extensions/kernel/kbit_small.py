"""Products with a small weight: unpacked whole, and multiplied by torch."""

import torch

from kbit_inductor import register_kernel
from kbit_inductor.kernels import reference
from kbit_inductor.lowering import ops


def linear_small(x, planes, scale, offset, global_scale, bias, group_size, codebook=None):
    weight = reference.dequantize(planes, scale, offset, global_scale, x.shape[-1], group_size, x.dtype, codebook)
    return torch.nn.functional.linear(x, weight, bias)


def supports(problem):
    if problem.family != "linear" or problem.dtype != torch.float32:
        return "computes products of float32 only"
    return None if problem.rows * problem.columns <= 4096 else "takes small weights only, of 4096 elements at most"


ops.define("linear", "_small")
torch.library.impl("kbit::linear_small", "CPU", linear_small)
small = register_kernel("small", "_small", supports, cost=lambda problem: problem.packed_bytes / 2)

"""Grids stretched until the codes hold the whole of a weight.

Codes of the least squared error are too near to zero: of the weight they hold the share 1 - D, where D is their relative squared
error, for what they lack is uncorrelated with what they hold. Each product of a model then comes out too small, and unlike noise
this does not average out from layer to layer: branches weigh too little in residual sums, attention is too even, logits too.
Divided by the share the codes lose D / (1 - D) instead of D, all of it noise.

The scale that makes a quantized vector unbiased: Vargaftik et al., "DRIVE" (2021); the same for each output channel of a weight, by
its variance: Banner et al., "Post training 4-bit quantization of convolutional networks" (2019).
"""

from __future__ import annotations

import contextlib
import dataclasses

import torch
from torch import Tensor

from kbit_inductor.quantizers.format import Format
from kbit_inductor.quantizers.gptq import one_thread
from kbit_inductor.quantizers.grid import Quantized, ratio
from kbit_inductor.quantizers.learned import on_grid
from kbit_inductor.quantizers.statistics import Statistics

CHUNK_ELEMENTS = 1 << 16  # of rows worked on at once: there are some six tensors of so many float32
NEGLIGIBLE = 2.0**-11  # an error below the rounding of a scale to float16 cannot be made good by one
LEAST_SHARE = 0.55  # codes that hold less are not of the row; and a scale, 2 ** 15 at most, stays within float16


def stretched(weight: Tensor, quantized: Quantized, format: Format, statistics: Statistics | None = None) -> Quantized:
    """``quantized``, codes for ``weight`` ``[N, K]``, with the grids of each row divided by the share of it that the codes hold.

    With ``statistics`` that is the share of its output: by E[x xᵀ], or by E[x²] where there is no Hessian.
    """
    if quantized.error <= NEGLIGIBLE:
        return quantized
    made = dataclasses.replace(quantized, scale=quantized.scale.clone())
    if made.offset is not None:
        made = dataclasses.replace(made, offset=made.offset.clone())
    lost = norm = 0.0
    step = max(1, CHUNK_ELEMENTS // max(weight.size(1), 1))
    # Products with a Hessian are sums in an order that depends on the number of threads.
    with contextlib.nullcontext() if statistics is None or statistics.hessian is None else one_thread():
        for start in range(0, len(weight), step):
            part = slice(start, start + step)
            values = weight[part].float() / quantized.global_scale
            share = _share(on_grid(_rows(made, part), format), values, statistics)
            for grid in (made.scale, made.offset):
                if grid is not None:
                    grid[part] = (grid[part].double() / share).half()
            lost += float((on_grid(_rows(made, part), format) - values).square().sum(dtype=torch.float64))
            norm += float(values.square().sum(dtype=torch.float64))
    return dataclasses.replace(made, error=ratio(lost, norm))


def _share(held: Tensor, values: Tensor, statistics: Statistics | None) -> Tensor:
    """Of each row of ``values`` ``[R, K]`` the share that ``held`` has, float64 ``[R, 1]``; never above 1."""
    counted = values
    if statistics is not None and statistics.hessian is not None:
        counted = values @ statistics.hessian.to(values)
    elif statistics is not None:
        counted = values * statistics.importance().to(values)
    found, whole = ((each * counted).sum(1, keepdim=True, dtype=torch.float64) for each in (held, values))
    return torch.where(whole > 0, found / whole, 1.0).clamp(LEAST_SHARE, 1.0)


def _rows(quantized: Quantized, part: slice) -> Quantized:
    offset = None if quantized.offset is None else quantized.offset[part]
    return dataclasses.replace(quantized, codes=quantized.codes[part], scale=quantized.scale[part], offset=offset)

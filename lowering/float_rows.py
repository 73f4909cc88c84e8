"""From how many rows of x on a launch unpacks its weight for PyTorch's product: by the cost model, for each GPU and shape."""

from __future__ import annotations

import functools
import sys

import torch

from kbit_inductor.kernels.triton.config import FLOAT_ROWS
from kbit_inductor.lowering.problem import Problem

ASKED_FROM = 128
"""Rows of x below which the cost model is not asked: decoding need not import sympy, which takes half a second."""


def multiplies_in_float(problem: Problem, m: int, device: torch.device) -> bool:
    """Whether a launch of ``m`` rows of x is to unpack its weight.

    On a device that no record is shipped for, from :data:`~kbit_inductor.kernels.triton.config.FLOAT_ROWS` on: a launch, which may
    be recorded in a CUDA graph, is no time to measure one.
    """
    return m >= ASKED_FROM and m >= _float_rows(problem, device)


@functools.cache  # a launch asks at each call; a model has few shapes
def _float_rows(problem: Problem, device: torch.device) -> int:
    if device.type != "cuda":
        return FLOAT_ROWS
    from kbit_inductor.lowering.cost.device import find
    from kbit_inductor.lowering.cost.triton_ways import float_rows, unpacks

    if not unpacks(problem):
        return sys.maxsize
    record = find(torch.cuda.get_device_name(device))
    if record is None:
        return FLOAT_ROWS
    least = float_rows(problem, record)
    return sys.maxsize if least is None else least

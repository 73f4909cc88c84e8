"""The ways in which the Triton kernels compute a product, and from how many rows of x on its weight is unpacked to float first."""

from __future__ import annotations

import functools

import numpy as np

from kbit_inductor.lowering.cost import time, triton_linear
from kbit_inductor.lowering.cost.crossover import LONGEST
from kbit_inductor.lowering.cost.device import DeviceRecord
from kbit_inductor.lowering.cost.products import LOOKUP, UNPACKED_FROM, UNPACKED_PRODUCT, bound
from kbit_inductor.lowering.cost.work import Work
from kbit_inductor.lowering.problem import Problem

REPRESENTATIVE_ROWS = (1, 16, 32, 64, 128, 256, 512, 1024, 2048)
"""Rows of x whose default configurations are all that :func:`~kbit_inductor.kernels.triton.config.default_config` gives, but for
how many programs share a tile, which is near enough to that of one of these."""
LEAST_FLOAT_ROWS = 128
"""Rows of x from which unpacking is thought of: fewer leave cuBLAS with tiles that are not full, which the model takes for full."""


def works(problem: Problem, device: DeviceRecord) -> list[Work]:
    """The kernel with each of its default configurations, and from many rows on the weight unpacked for a float product.

    The fastest is what is taken to be launched.
    """
    if problem.family == "embedding":
        return [bound(LOOKUP, problem)]
    ways = _by_words(problem, device)
    if unpacks(problem) and (least := float_rows(problem, device)) is not None:
        ways.append(bound(UNPACKED_FROM, problem).at(least_rows=least))
    return ways


def unpacks(problem: Problem) -> bool:
    """Whether a product may unpack its weight: of one matrix, with 16-bit activations as they are."""
    return problem.family == "linear" and problem.dtype.itemsize == 2 and triton_linear.operand_dtype(problem) == problem.dtype


@functools.lru_cache(maxsize=1024)  # the layers of a model have few shapes
def float_rows(problem: Problem, device: DeviceRecord) -> int | None:
    """The rows of x from which unpacking is always the faster, or None where that is beyond :data:`LONGEST` or never.

    Below, either may be faster by a little, by how its last wave of programs is filled.
    """
    m = np.arange(LEAST_FLOAT_ROWS, LONGEST + 1)
    by_words = np.stack([time.seconds(work, device, m) for work in _by_words(problem, device)]).min(0)
    slower = np.flatnonzero(by_words <= time.seconds(bound(UNPACKED_PRODUCT, problem), device, m))
    first = 0 if slower.size == 0 else int(slower[-1]) + 1
    return int(m[first]) if first < m.size else None


def _by_words(problem: Problem, device: DeviceRecord) -> list[Work]:
    configs = dict.fromkeys(triton_linear.default(problem, m, device) for m in REPRESENTATIVE_ROWS)
    return [triton_linear.linear(problem, config, device) for config in configs]

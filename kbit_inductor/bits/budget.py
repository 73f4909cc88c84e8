"""How much there is for all layers, in bits, bytes or seconds, and what of it a layer takes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

from torch import Tensor

from kbit_inductor.bits.units import Unit
from kbit_inductor.config import Config, LayerConfig
from kbit_inductor.errors import BudgetError
from kbit_inductor.lowering.problem import Problem
from kbit_inductor.reports.expectation import Clock

LEAST_BITS, MOST_BITS = 1, 8
TICKS = 20_000  # of a latency budget: what a choice is exact to


class Budget:
    """How much there is for all units, and what counts.

    Attributes:
        text: for messages.
        limit: what all may take together.
        size: what a unit takes at some bits.
    """

    def __init__(self, text: str, limit: int, size: Callable[[Unit, int], int]) -> None:
        self.text, self.limit, self.size = text, limit, size

    @classmethod
    def of(cls, config: Config, units: Sequence[Unit], bytes_in_float: int) -> Budget:
        """The one that ``config`` sets, of which ``bytes_in_float`` are taken already."""
        if config.average_bits is not None:
            limit = int(config.average_bits * sum(unit.elements for unit in units) + 1e-6)
            return cls(f"{config.average_bits:g} bits on average", limit, lambda unit, bits: bits * unit.elements)
        if config.budget_seconds is not None:
            tick = config.budget_seconds / TICKS
            text = f"latency_budget={config.latency_budget!r} (expected time of all products for one row)"
            return cls(text, TICKS, lambda unit, bits: math.ceil(seconds(unit, bits) / tick))
        limit = (config.budget_bytes or 0) - bytes_in_float
        text = f"memory_budget={config.memory_budget!r} ({bytes_in_float:,} bytes of it stay in float)"
        return cls(text, limit, lambda unit, bits: unit.nbytes[bits])

    def uniform(self, units: Sequence[Unit]) -> int:
        """The most bits that all units can have alike, but for those that are pinned.

        Raises:
            BudgetError: even the least bits do not fit.
        """
        needed = 0
        for bits in range(MOST_BITS, LEAST_BITS - 1, -1):
            needed = sum(self.size(unit, unit.pinned or bits) for unit in units)
            if needed <= self.limit:
                return bits
        left = f"of {self.limit:,}" if self.limit >= 0 else f"and {-self.limit:,} are missing without it"
        raise BudgetError(f"{self.text} is too little: 1 bit everywhere takes {needed:,} {left}; give more")


def seconds(unit: Unit, bits: int) -> float:
    """The expected time of a unit's products for one row of x, on the device that its weights are on."""
    return sum(_seconds(_problem(unit, weight, bits), unit.config, str(weight.device)) for weight in unit.weights)


def _problem(unit: Unit, weight: Tensor, bits: int) -> Problem:
    rows, columns = weight.shape
    family = "embedding" if weight in unit.looked_up else "linear"
    layer = unit.config
    return Problem(
        family, weight.device.type, weight.dtype, rows, columns, bits, layer.group_columns(columns), layer.codebook == "uniform",
        symmetric=layer.symmetric, device_index=weight.device.index or 0,
    )  # fmt: skip


@functools.lru_cache(maxsize=4096)  # the layers of a model have few shapes
def _seconds(problem: Problem, config: LayerConfig, device: str) -> float:
    return sum(each.seconds for each in Clock(device).times([(problem, 1)], config))

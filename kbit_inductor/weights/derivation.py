"""Weights that a graph computes from others: a norm times a direction, a standardised kernel, a scaled matrix.

What computes them is kept as a small graph and run when they are packed, so nothing of it is left at a call.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from kbit_inductor._compat import no_modes
from kbit_inductor.given_grid import GivenGrid


@dataclass(frozen=True, eq=False)
class Derivation:
    """How a weight comes from parameters and buffers.

    Attributes:
        sources: their positions among the inputs of the captured graph; the first is the one that the weight is named after.
        graph: a function of their values to the weight's, of ATen operators that write to nothing and draw nothing.
        grid: that its values lie on, where the graph says so.
    """

    sources: tuple[int, ...]
    graph: fx.GraphModule
    grid: GivenGrid | None = None

    @cached_property
    def key(self) -> str:
        """The same for graphs that compute the same."""
        return hashlib.sha256(f"{self.graph.code} {self.grid}".encode()).hexdigest()

    def compute(self, arguments: Sequence[Any]) -> Tensor:
        """The weight, for the parameters among ``arguments`` as they are now."""
        with no_modes(), torch.no_grad():
            computed: Tensor = self.graph(*(arguments[position].detach() for position in self.sources))
        return computed

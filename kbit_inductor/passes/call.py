"""The CPU's fused operators in a graph, and the arguments of a product by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from kbit_inductor.capture import VALUE
from kbit_inductor.passes.patterns import is_constant

FUSED = torch.ops.kbit.fused_linear_cpu.default
ATTENTION = torch.ops.kbit.attention_cpu.default


@dataclass
class Call:
    """The arguments of a ``fused_linear_cpu`` node by name."""

    x: fx.Node
    norm_weight: Any
    eps: float
    weights: list[fx.Node]
    biases: list[Any]
    rows: list[int]
    activation: str
    gated: bool
    residual: Any
    activation_bits: int
    dtype: torch.dtype | None = None  # of the result, where it is not that of x

    @classmethod
    def of(cls, node: Any) -> Call | None:
        """The call that ``node`` is, if what it reads and gives is written to by nothing: only then may it move."""
        if not isinstance(node, fx.Node) or node.target is not FUSED:
            return None
        if not all(is_constant(each) for each in (node, *node.all_input_nodes)):
            return None
        return cls(*(list(a) if isinstance(a, (list, tuple)) else a for a in node.args))  # type: ignore[arg-type]

    @property
    def plain(self) -> bool:
        """Whether nothing is fused behind the product yet."""
        return not self.activation and not self.gated and self.residual is None and self.dtype is None

    def round_to(self, dtype: torch.dtype) -> None:
        """Let the result be of ``dtype``."""
        self.dtype = None if dtype == self.x.meta[VALUE].dtype else dtype

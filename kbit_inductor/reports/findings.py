"""What ``explain`` finds out about a model, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from kbit_inductor.config import LayerConfig
from kbit_inductor.reports.expectation import Expectation


@dataclass(frozen=True)
class LayerReport:
    """One weight matrix of the model.

    Attributes:
        name: of the layer.
        shape: ``(N, K)`` of the matrix, ``(E, N, K)`` of a batch, or the parameter's shape where it is not matched.
        matched: whether a packed form takes its place.
        reasons: why not, or why its floats are needed besides, what the quantizer does without, or why it has more bits.
        uses: how it is used, ``"linear"``, ``"embedding"``, ``"batched_linear"`` or ``"grouped_linear"``, once for each node.
        config: bits, group size and so on; None when not matched.
        bytes_before: of the float matrix.
        bytes_after: of the packed one, scales included; as before when not matched.
        error: squared error over squared norm.
        kernels: chosen for each of ``uses``.
        rejected: by kernel name, why the others were not chosen.
        expected: how long each of ``uses`` is expected to take, on a GPU or where a device was asked for.
    """

    name: str
    shape: tuple[int, ...]
    matched: bool
    reasons: tuple[str, ...] = ()
    uses: tuple[str, ...] = ()
    config: LayerConfig | None = None
    bytes_before: int = 0
    bytes_after: int = 0
    error: float = 0.0
    kernels: tuple[str, ...] = ()
    rejected: Mapping[str, str] = field(default_factory=dict)
    expected: tuple[Expectation, ...] = ()


@dataclass(frozen=True)
class Findings:
    """What is found out about a model.

    Attributes:
        layers: one report for each weight matrix, matched or not.
        graphs: how many graphs Dynamo made.
        graph_breaks: reason to count.
        fusions: kind (``"siblings"``, ``"norm"``, ``"chained"``, …) to how many calls became part of another one.
    """

    layers: tuple[LayerReport, ...]
    graphs: int
    graph_breaks: Mapping[str, int]
    fusions: Mapping[str, int] = field(default_factory=dict)

    @property
    def matched(self) -> tuple[LayerReport, ...]:
        """The layers that are packed."""
        return tuple(layer for layer in self.layers if layer.matched)

    @property
    def seconds(self) -> float:
        """What all products and look-ups on packed weights are expected to take, one after the other; 0 where none is known."""
        return sum(each.seconds for layer in self.layers for each in layer.expected)

    def layer(self, name: str) -> LayerReport:
        """The report of the layer ``name``; KeyError when there is none."""
        for report in self.layers:
            if report.name == name:
                return report
        raise KeyError(name)

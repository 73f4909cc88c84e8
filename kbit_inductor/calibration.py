"""What calibration has found out, by weight: statistics of the inputs that each weight is multiplied with."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from kbit_inductor.quantizers import Statistics


class Calibration:
    """Statistics of the inputs of a model's layers, from :func:`kbit_inductor.calibrate`; the value of the option ``calibration``.

    They belong to parameters, which are held weakly, so that one compiled graph finds those of every layer it is called with.

    Attributes:
        layers: statistics by layer name.
        key: stands for this calibration where it must not be kept alive.
    """

    def __init__(self, weights: Mapping[str, Tensor], layers: Mapping[str, Statistics]) -> None:
        self.layers = dict(layers)
        self.key = object()
        self._by_weight = WeakIdKeyDictionary()
        for name, statistics in layers.items():
            self._by_weight[weights[name]] = statistics

    def of(self, weight: Tensor, columns: int) -> Statistics | None:
        """The statistics of what matrices ``[N, columns]`` of ``weight`` are multiplied with; None where there are none."""
        statistics: Statistics | None = self._by_weight.get(weight)
        return statistics if statistics is not None and len(statistics.mean_square) == columns else None

    def __repr__(self) -> str:
        return f"Calibration of {len(self.layers)} layers"

"""What calibration has found out, by weight: statistics of the inputs that each weight is multiplied with."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from kbit_inductor.logs import logger
from kbit_inductor.quantizers import QUANTIZERS, Statistics
from kbit_inductor.quantizers.registry import WITH_HESSIAN

if TYPE_CHECKING:
    from kbit_inductor.config import LayerConfig

log = logger("pack")


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


def lacking(config: LayerConfig, statistics: Statistics | None) -> Iterator[str]:
    """What a weight packed by ``config`` has to do without, since its ``statistics`` lack it."""
    name = config.quantizer
    if QUANTIZERS[name].needs in WITH_HESSIAN and (statistics is None or statistics.hessian is None):
        yield f"quantizer {name!r} does without the Hessian that it is made for; give its inputs' by the option 'calibration'"
    if config.bias_correction and (statistics is None or statistics.mean is None):
        yield "no bias correction: the mean of its inputs is not known; give it by the option 'calibration'"


@functools.cache
def warn_lacking(reason: str) -> None:
    """Once for each quantizer."""
    log.warning("%s", reason)

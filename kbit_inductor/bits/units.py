"""The weights of a model as units that get the same bits: names of one weight, and layers that share an input."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kbit_inductor.calibration import Calibration
from kbit_inductor.config import Config, LayerConfig
from kbit_inductor.ends import ends_of_model
from kbit_inductor.packing import WEIGHT_DTYPES, PackedWeight, pack


@dataclass
class Unit:
    """Weights that get the same bits, and what is known of them.

    Attributes:
        weights: the names of each.
        config: of the layers, but for the bits.
        pinned: the bits that ``overrides`` set, or None.
        is_end: whether a table, or the head, is among them.
        looked_up: those that nothing is multiplied by.
        nbytes: packed bytes by bits.
        errors: relative squared error by bits.
        factor: what an error of 1 costs.
    """

    weights: dict[Tensor, list[str]]
    config: LayerConfig
    pinned: int | None = None
    is_end: bool = False
    looked_up: set[Tensor] = field(default_factory=set)
    nbytes: dict[int, int] = field(default_factory=dict)
    errors: dict[int, float] = field(default_factory=dict)
    factor: float = 1.0

    @property
    def names(self) -> tuple[str, ...]:
        """All names of all weights."""
        return tuple(name for names in self.weights.values() for name in names)

    @property
    def elements(self) -> int:
        """Weights, in number."""
        return sum(weight.numel() for weight in self.weights)

    def pack(self, bits: int, calibration: Calibration | None, quantizer: str | None = None) -> dict[Tensor, PackedWeight]:
        """The weights at ``bits``, by their own quantizer or another one."""
        config = dataclasses.replace(self.config, bits=bits, quantizer=quantizer or self.config.quantizer)
        packed = {}
        for weight, names in self.weights.items():
            statistics = None if calibration is None else calibration.of(weight, weight.size(1))
            packed[weight] = pack(weight.detach(), config, names[0], statistics=statistics)
        return packed

    def measure(self, bits: int, calibration: Calibration | None) -> None:
        """Note bytes and error at ``bits``, as the clip search, which is quick, has them."""
        packed = self.pack(bits, calibration, "clip")
        self.nbytes[bits] = sum(one.nbytes for one in packed.values())
        total = sum(_relative_error(weight, one, calibration) * weight.numel() for weight, one in packed.items())
        self.errors[bits] = total / max(self.elements, 1)


def find_units(model: nn.Module, config: Config, siblings: Iterable[Iterable[str]] = ()) -> list[Unit]:
    """The weights of ``model`` that would be packed, those of each of ``siblings``, layers that share an input, together."""
    names: dict[Tensor, list[str]] = {}
    products: set[Tensor] = set()
    for path, module in model.named_modules(remove_duplicate=False):
        for own, weight in module.named_parameters(recurse=False, remove_duplicate=False):
            name = path if own == "weight" and path else f"{path}.{own}".removeprefix(".")
            if weight.dim() == 2 and weight.dtype in WEIGHT_DTYPES and weight.numel() >= config.min_elements:
                names.setdefault(weight, []).append(name)
                if not isinstance(module, nn.Embedding):
                    products.add(weight)
    group = {name: index for index, together in enumerate(siblings) for name in together}
    units: dict[Any, Unit] = {}
    ends, whole = _ends(model, names), ends_of_model(model)
    for weight, known in names.items():
        layer = config.for_layer(known[0], weight in whole)
        if layer is None:
            continue
        pinned = next((bits for name in known if (bits := config.pinned_bits(name)) is not None), None)
        together = next((group[name] for name in known if name in group), None)
        key = (id(weight) if together is None else ("together", together), pinned, layer)
        unit = units.setdefault(key, Unit({}, layer, pinned))
        unit.weights[weight] = known
        unit.is_end |= weight in ends
        if weight not in products:
            unit.looked_up.add(weight)
    return list(units.values())


def _ends(model: nn.Module, names: Mapping[Tensor, list[str]]) -> set[Tensor]:
    """Tables, and the last layer."""
    tables = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    layers = [weight for weight in names if weight not in tables]
    return tables | set(layers[-1:])


def _relative_error(weight: Tensor, packed: PackedWeight, calibration: Calibration | None) -> float:
    """Squared error over squared norm; of outputs, where it is known how large each input is."""
    statistics = None if calibration is None else calibration.of(weight, packed.columns)
    if statistics is None:
        return packed.error
    importance = statistics.importance().to(weight.device)
    norm = float((weight.float().square() @ importance).sum(dtype=torch.float64))
    error = float(((packed.dequantize() - weight.float()).square() @ importance).sum(dtype=torch.float64))
    return error / norm if norm else 0.0

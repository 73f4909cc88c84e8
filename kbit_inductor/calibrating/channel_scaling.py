"""Channels scaled before weights are quantized: those that large inputs meet are rounded finely, and the model stays the same.

Lin et al., "AWQ: Activation-aware Weight Quantization" (2023). A layer's columns are multiplied by a power of the root of E[x²].
What comes before it is divided by the same (:mod:`kbit_inductor.passes.preceding`). The power is the one of a few with the least
error of the outputs, as calibration knows it.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, fx, nn

from kbit_inductor.calibrating.calibrate import batches, calibrate
from kbit_inductor.calibration import Calibration
from kbit_inductor.capture import layer_name
from kbit_inductor.config import Config, LayerConfig
from kbit_inductor.errors import EmptyCalibrationError
from kbit_inductor.packing import pack
from kbit_inductor.passes.preceding import Preceding, preceding
from kbit_inductor.printed import printed
from kbit_inductor.progress import Progress
from kbit_inductor.quantizers import QUANTIZERS, Statistics
from kbit_inductor.quantizers.registry import WITH_HESSIAN

POWERS = tuple(step / 10 for step in range(11))
MOST = 64.0  # of a scale, and its inverse


@dataclass(frozen=True)
class ScaledLayers:
    """Layers that share an input.

    Attributes:
        names: of the layers.
        power: of the root of E[x²] that their columns were multiplied by; 0 where they are as they were.
        before: squared error of their outputs over their squared norm, quantized as they were.
        after: quantized as they are now.
        reason: what was divided in their place, or why nothing was done.
    """

    names: tuple[str, ...]
    power: float
    before: float
    after: float
    reason: str


@dataclass(frozen=True)
class ChannelScaling:
    """What :func:`kbit_inductor.scale_channels_` has done. It prints as a table."""

    layers: tuple[ScaledLayers, ...]

    def __rich__(self) -> Table:
        table = Table(title="channels scaled")
        for title in ("layers", "power", "error before", "after", "why"):
            table.add_column(title, overflow="fold")
        for layer in self.layers:
            table.add_row(", ".join(layer.names), f"{layer.power:g}", f"{layer.before:.3g}", f"{layer.after:.3g}", layer.reason)
        return table

    def __str__(self) -> str:
        return printed(self)


@torch.no_grad()
def scale_channels_(
    model: nn.Module,
    data: Any,
    config: Config | Mapping[str, Any] | None = None,
    *,
    tokenizer: Callable[..., Mapping[str, Any]] | None = None,
) -> ChannelScaling:
    """Scale the channels between the layers of ``model``, in place, for the quantizer of ``config``. It computes what it did.

    It does so up to the rounding of its dtype. Calibrate and quantize after it: statistics of before are of other inputs.

    Args:
        model: on float weights.
        data: as :func:`kbit_inductor.calibrate` takes it.
        config: the options that the model will be quantized with.
        tokenizer: of texts.

    Returns:
        What was done, layer by layer, and why where nothing was.

    Raises:
        EmptyCalibrationError, NonFiniteActivationError, InvalidOptionError: as :func:`kbit_inductor.calibrate` raises them.
    """
    resolved = Config.from_options(config)
    given = [dict(keywords) or arguments for arguments, keywords in batches(data, tokenizer, model)]
    if not given:
        raise EmptyCalibrationError("the calibration data has no batch; give at least one")
    hessian = QUANTIZERS[resolved.quantizer].needs in WITH_HESSIAN
    calibration = calibrate(model, given, {"quantizer": "gptq" if hessian else "clip"})  # nothing is to be learned
    done = []
    places = _places(model, given[0])
    with Progress(len(places), "scaling channels") as progress:
        for place in places:
            done.append(_scale(place, calibration, resolved))
            progress.advance(place.names[0])
    return ChannelScaling(tuple(done))


@dataclass(frozen=True)
class Place:
    """Layers that share an input: their names and weights, and the parameters before them, or why there are none."""

    names: tuple[str, ...]
    weights: tuple[Tensor, ...]
    sources: Mapping[str, Tensor]
    reason: str


def _places(model: nn.Module, batch: Any) -> list[Place]:
    """All places of ``model`` as it runs on ``batch``."""
    held = Counter(id(weight) for module in model.modules() for weight in module.parameters(recurse=False))
    graphs: list[tuple[fx.Graph, Sequence[Any]]] = []

    def keep(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        graphs.append((gm.graph, inputs))
        return gm.forward

    def call(*arguments: Any, **keywords: Any) -> Any:
        return model(*arguments, **keywords)

    compiled = torch.compile(call, backend=keep, dynamic=False)
    compiled(**batch) if isinstance(batch, dict) else compiled(*batch)
    for _, inputs in graphs:
        held.update({id(each) for each in inputs} & held.keys())
    # Once in a module and once in a graph: what else could read it would read another value.
    once = {key for key, count in held.items() if count == 2}
    return [_place(found, graph, inputs, once) for graph, inputs in graphs for found in preceding(graph) if found.weights]


def _place(found: Preceding, graph: fx.Graph, inputs: Sequence[Any], once: set[int]) -> Place:
    value = dict(zip(graph.find_nodes(op="placeholder"), inputs, strict=True))
    names = tuple(layer_name(node)[0] for node in found.weights)
    weights, sources = (tuple(value[node] for node in nodes) for nodes in (found.weights, found.sources))
    if not found.reason and any(id(each) not in once for each in (*weights, *sources)):
        return Place(names, weights, {}, "other modules or graphs use a weight of it or of what comes before")
    return Place(names, weights, {layer_name(node)[0]: value[node] for node in found.sources}, found.reason)


def _scale(place: Place, calibration: Calibration, config: Config) -> ScaledLayers:
    layers = [config.for_layer(name) for name in place.names]
    quantized = [(weight, layer) for weight, layer in zip(place.weights, layers, strict=True) if layer is not None]
    statistics = calibration.of(place.weights[0], place.weights[0].size(1))
    reason = place.reason or ("" if quantized else "skipped by the option 'skip'")
    if reason or statistics is None:
        return ScaledLayers(place.names, 0.0, 0.0, 0.0, reason or "calibration has not reached it")
    errors = {power: _error(quantized, statistics, _scales(statistics, power)) for power in POWERS}
    best = min(errors, key=lambda power: errors[power])
    told = "by no scale it would lose less" if not best else f"divided {', '.join(place.sources)}"
    if best:
        _apply(place, _scales(statistics, best))
    return ScaledLayers(place.names, best, errors[0.0], errors[best], told)


def _scales(statistics: Statistics, power: float) -> Tensor:
    """One for each column, float32 ``[K]``, about 1."""
    scales = statistics.importance().pow(power / 2)
    return (scales / (scales.max() * scales.min()).sqrt()).clamp(1 / MOST, MOST)


def _error(quantized: Sequence[tuple[Tensor, LayerConfig]], statistics: Statistics, scales: Tensor) -> float:
    """The squared error of the outputs over their squared norm, the weights quantized with their columns times ``scales``."""
    hessian = None if statistics.hessian is None else statistics.hessian / scales.outer(scales)
    told = Statistics(statistics.mean_square / scales.square(), hessian, statistics.rows)
    error = norm = 0.0
    for weight, layer in quantized:
        needs = QUANTIZERS[layer.quantizer].needs
        config = dataclasses.replace(layer.without_side, quantizer="clip" if needs in WITH_HESSIAN else layer.quantizer)
        rounded = pack(weight.detach().float() * scales, config, statistics=told).dequantize() / scales
        error += _output(rounded - weight, statistics)
        norm += _output(weight, statistics)
    return error / norm if norm else 0.0


def _output(weight: Tensor, statistics: Statistics) -> float:
    """E[|x @ weight.T|²], as far as ``statistics`` know it."""
    weight = weight.float()
    if statistics.hessian is None:
        return float((weight.square() @ statistics.mean_square).sum(dtype=torch.float64))
    return float(((weight @ statistics.hessian) * weight).sum(dtype=torch.float64))


def _apply(place: Place, scales: Tensor) -> None:
    for source in place.sources.values():
        source.div_(scales.to(source.dtype).view(-1, *[1] * (source.dim() - 1)))
    for weight in place.weights:
        weight.mul_(scales.to(weight.dtype))

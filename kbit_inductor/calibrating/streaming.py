"""Statistics for a part of the model at a time, so that the Hessians of one block are there at once, and not those of all.

What a layer is given comes from those before it. So the blocks come from the last to the first: when the turn of one has come,
those before it are still in float, and its statistics are the ones that :func:`kbit_inductor.calibrate` finds, though the later
ones are packed by then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from kbit_inductor.calibrating.calibrate import batches, check_reached, learns, observe, of_layers
from kbit_inductor.calibrating.reconstruct import blocks
from kbit_inductor.calibration import Calibration
from kbit_inductor.config import Config
from kbit_inductor.quantizers import QUANTIZERS


def can_stream(model: nn.Module, config: Config) -> bool:
    """Whether Hessians are asked for, and nothing that is learned, which takes those of all layers."""
    layers = (config.for_layer(name) for name, module in model.named_modules() if type(module) is nn.Linear)
    return not learns(model, config) and any(layer and QUANTIZERS[layer.quantizer].needs == "hessian" for layer in layers)


def parts(model: nn.Module, weights: Sequence[Sequence[tuple[str, nn.Module]]]) -> list[list[int]]:
    """The indices of ``weights``, each told by the names and modules that have it: those of one block together, the last block
    first, and in the end what is in no block or in several."""
    inside = {module: index for index, block in enumerate(blocks(model)) for module in block.modules()}
    found: dict[int, list[int]] = {}
    for index, places in enumerate(weights):
        where = {inside.get(module, -1) for _, module in places}
        found.setdefault(where.pop() if len(where) == 1 else -1, []).append(index)
    return [found[block] for block in sorted(found, reverse=True)]


def stream(
    model: nn.Module,
    data: Any,
    config: Config,
    tokenizer: Callable[..., Mapping[str, Any]] | None,
    names: Sequence[Sequence[str]],
) -> Iterator[Calibration]:
    """The statistics for each part, given by the ``names`` of its layers; whoever asks for the next one has packed those before.

    The first pass tells everything but Hessians, so that bad data is seen before anything has changed. Those of the last part,
    which may come first in the model, are collected by it too.

    Raises:
        EmptyCalibrationError, NonFiniteActivationError, InvalidOptionError: as :func:`kbit_inductor.calibrate`.
    """
    data = [dict(keywords) or arguments for arguments, keywords in batches(data, tokenizer, model)]
    *waiting, last = names
    found = observe(model, data, config, hessians_of=set(last))
    check_reached(found)
    kept = {name: each for name in last if (each := found.get(name)) is not None}
    del found
    for part in waiting:
        seen = observe(model, data, config, hessians_of=set(part))
        yield of_layers(model, {name: each for name in part if (each := seen.pop(name, None)) is not None})
    yield of_layers(model, kept)

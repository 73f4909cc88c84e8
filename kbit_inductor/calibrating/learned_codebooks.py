"""Codebooks learned for a model, each for one weight, as options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from kbit_inductor.config import Config
from kbit_inductor.ends import ends_of_model
from kbit_inductor.errors import InvalidOptionError
from kbit_inductor.packing import WEIGHT_DTYPES, check_finite
from kbit_inductor.progress import Progress
from kbit_inductor.quantizers.codebooks import as_text
from kbit_inductor.quantizers.kmeans import learn_levels


@torch.no_grad()
def learn_codebooks(model: nn.Module, config: Config | Mapping[str, Any] | None = None) -> dict[str, dict[str, Any]]:
    """Levels learned for each ``nn.Linear`` and ``nn.Embedding`` of ``model`` by weighted k-means, for the option ``overrides``.

    A value counts by E[x²] of its column where ``config`` has a ``calibration``. Layers of 1 and 8 bits, small ones and those that
    ``skip`` names are not among them. Layers of different levels do not become one kernel.

    Args:
        model: on float weights.
        config: the options, with bits that are known; entries of its ``overrides`` are part of what is returned, and win.

    Raises:
        InvalidOptionError: ``bits`` is ``"auto"``.
        NonFiniteWeightError: a weight with NaN or an infinity.
    """
    resolved = Config.from_options(config)
    if resolved.bits == "auto":
        raise InvalidOptionError("levels are learned for bits that are known; take the config that plan(…).apply returns")
    ends = ends_of_model(model)
    layers = [
        (name, module.weight)
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Embedding)) and module.weight.numel() >= max(resolved.min_elements, 1)
    ]
    found = {name: dict(options) for name, options in resolved.overrides.items()}
    with Progress(len(layers), "learning levels") as progress:
        for name, weight in layers:
            layer = resolved.for_layer(name, weight in ends)
            if layer is None or weight.dtype not in WEIGHT_DTYPES or layer.cascade:
                continue
            check_finite(weight, name)
            statistics = None if resolved.calibration is None else resolved.calibration.of(weight, weight.size(1))
            levels = learn_levels(weight.detach(), layer.format(weight.size(1)), statistics)
            if levels is not None:
                own = {"bits": layer.bits, "codebook": as_text(levels)}
                found[name] = {**own, **found.pop(name, {})}
            progress.advance(name)
    return found

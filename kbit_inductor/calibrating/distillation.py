"""Grids tuned end to end, so that the model on packed weights predicts what the float one does.

What is learned is two numbers for each group of weights, far fewer than there are weights, so a few thousand tokens do not overfit
them.
The method: :mod:`kbit_inductor.quantizers.distill`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from kbit_inductor.calibrating.reconstruct import layers_to_learn, without_cache
from kbit_inductor.calibrating.resume import Resume, ToLearn
from kbit_inductor.config import Config
from kbit_inductor.logs import logger
from kbit_inductor.outputs import divergence, rows_of
from kbit_inductor.progress import Progress
from kbit_inductor.quantizers import Learned, Statistics, TunedGrids
from kbit_inductor.quantizers.gptq import one_thread

log = logger("pack")
STEPS = 32
ROWS = 1024  # at least, of one step, of all that there are
RATE = 5e-3  # at first, of Adam: what a scale grows by in one step

Batch = tuple[tuple[Any, ...], Mapping[str, Any]]


def distill(
    model: nn.Module, data: Sequence[Batch], config: Config, statistics: Mapping[str, Statistics], folder: Path | None = None
) -> dict[str, Statistics]:
    """``statistics`` by layer name, with codes for those layers whose quantizer asks for predictions.

    Grids are tuned by one thread, so that they are as reproducible as what the model's own passes return.

    Args:
        model: on float weights.
        data: arguments and keywords of its calls.
        config: the options of the layers.
        statistics: of what the layers are given.
        folder: where the grids are kept, once all are done, and found again by a run that is the same.
    """
    layers = layers_to_learn(model, model, config, statistics, "predictions")
    if not layers:
        return dict(statistics)
    kept = Resume(None if folder is None else folder / "distilled", f"{STEPS} {ROWS} {RATE}")
    learned = kept.next(layers)
    if learned is None:
        with torch.inference_mode(False), torch.no_grad(), without_cache(model), one_thread():
            learned = _learn(model, layers, data)
        kept.keep(learned)
    return {**statistics, **{name: dataclasses.replace(statistics[name], learned=each) for name, each in learned.items()}}


def _learn(model: nn.Module, layers: Mapping[str, ToLearn], data: Sequence[Batch]) -> dict[str, Learned]:
    """Adam with a rate that falls to zero. What is no better than the grids of the start is not kept."""
    grids = {each.key: TunedGrids(each.weight.detach(), each.format, each.statistics) for each in layers.values()}
    variables = [variable for each in grids.values() for variable in each.variables]
    begun = [variable.detach().clone() for variable in variables]
    optimizer, generator = torch.optim.Adam(variables, RATE), torch.Generator().manual_seed(0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / STEPS)) / 2)
    before = _mean(model, grids, data)
    with Progress(STEPS, "tuning grids") as progress:
        for step in range(STEPS):
            optimizer.zero_grad()
            _add_gradients(model, grids, data, variables, generator)
            optimizer.step()
            schedule.step()
            progress.advance(f"step {step + 1}")
    after = _mean(model, grids, data)
    log.info("tuned the grids of %d layers: divergence of the model %.3g, before %.3g", len(layers), after, before)
    chosen = iter(variables if after < before else begun)
    return {name: grids[each.key].learned([next(chosen) for _ in grids[each.key].variables]) for name, each in layers.items()}


def _add_gradients(
    model: nn.Module,
    grids: Mapping[str, TunedGrids],
    data: Sequence[Batch],
    variables: Sequence[Tensor],
    generator: torch.Generator,
) -> None:
    """Those of batches in random order, until they have :data:`ROWS`."""
    rows = 0
    for index in torch.randperm(len(data), generator=generator).tolist():
        if rows >= ROWS:
            break
        lost, count = _lost(model, grids, data[index])
        lost.backward(inputs=list(variables))
        rows += count


def _mean(model: nn.Module, grids: Mapping[str, TunedGrids], data: Sequence[Batch]) -> float:
    return sum(float(_lost(model, grids, batch)[0].detach()) for batch in data) / len(data)


def _lost(model: nn.Module, grids: Mapping[str, TunedGrids], batch: Batch) -> tuple[Tensor, int]:
    """The divergence from the float model on ``batch``, with gradients, and how many rows the model returns."""
    arguments, keywords = batch
    exact, are_logits = rows_of(model(*arguments, **keywords))
    with torch.enable_grad():
        weights = {key: each.dequantized() for key, each in grids.items()}
        found, _ = rows_of(functional_call(model, weights, arguments, dict(keywords)))
        lost, unit = divergence(exact, found, are_logits)
        return lost / unit.clamp(min=torch.finfo(unit.dtype).tiny), len(exact)

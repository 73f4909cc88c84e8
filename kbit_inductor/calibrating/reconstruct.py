"""Codes learned block by block, so that each block of a model returns what it did in float.

The blocks are learned in their order. What a block is given comes from those before it with the codes that they have by then, and
what it should return is what the float model's block does, so that a block also makes good what those before have lost (block-wise
reconstruction: Li et al., "BRECQ", 2021; the roundings: :mod:`kbit_inductor.quantizers.autoround`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from kbit_inductor.calibrating.resume import Resume, ToLearn
from kbit_inductor.config import Config
from kbit_inductor.ends import ends_of_model
from kbit_inductor.logs import logger
from kbit_inductor.packing import PackedWeight, check_finite, pack
from kbit_inductor.progress import Progress
from kbit_inductor.quantizers import QUANTIZERS, Learned, LearnedRounding, Statistics
from kbit_inductor.quantizers.gptq import one_thread
from kbit_inductor.weights.substitution import substituted

log = logger("pack")
STEPS = 200
ROWS = 1024  # at least, of one step, of all that there are


@dataclass(frozen=True)
class Call:
    """A call of a block, and the tensor that it returned, or the first of those."""

    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]
    output: Tensor


def learn(
    model: nn.Module,
    run: Callable[[], None],
    config: Config,
    statistics: Mapping[str, Statistics],
    folder: Path | None = None,
) -> dict[str, Statistics]:
    """``statistics`` by layer name, with codes for those layers whose quantizer asks for outputs and that are in a block.

    What is learned is learned by one thread, so that the codes are as reproducible as what the model's own passes return.

    Args:
        model: on float weights.
        run: calls it on all the data.
        config: the options of the layers.
        statistics: of what the layers are given.
        folder: where the codes of each block are kept, and found again by a run that is the same.
    """
    found, done = dict(statistics), dict[Tensor, PackedWeight]()
    waiting = [
        (block, layers) for block in blocks(model) if (layers := layers_to_learn(model, block, config, statistics, "outputs"))
    ]
    kept, progress = Resume(folder, f"{STEPS} {ROWS}"), Progress(len(waiting), "learning roundings")
    with torch.inference_mode(False), torch.no_grad(), without_cache(model), progress:
        for block, layers in waiting:
            learned = kept.next(layers)
            if learned is None:
                learned = _learn(block, layers, _targets(model, block, run, done))
                kept.keep(learned)
            for name, codes in learned.items():
                layer, weight = layers[name].config, layers[name].weight
                found[name] = dataclasses.replace(statistics[name], learned=codes)
                done[weight] = pack(weight.detach(), layer, name, statistics=found[name])
            progress.advance(next(iter(layers)))
    return found


def blocks(model: nn.Module) -> list[nn.Module]:
    """What the outermost lists of ``model`` hold, in order; a module that is there twice is there once."""
    found: dict[nn.Module, None] = {}
    waiting = [model]
    while waiting:
        module = waiting.pop()
        children = list(module.children())
        if isinstance(module, (nn.ModuleList, nn.Sequential)):
            found.update(dict.fromkeys(children))
        else:
            waiting.extend(reversed(children))
    return list(found)


def layers_to_learn(
    model: nn.Module, block: nn.Module, config: Config, statistics: Mapping[str, Statistics], needs: str
) -> dict[str, ToLearn]:
    """The layers of ``block``, by their names in ``model``, whose quantizer ``needs`` codes that are learned; not those that share
    their weight."""
    inside = {module: name for name, module in block.named_modules()}
    holders = Counter(id(weight) for module in model.modules() for weight in module.parameters(recurse=False))
    found, ends = {}, ends_of_model(model)
    for name, module in model.named_modules():
        if type(module) is not nn.Linear or module not in inside or name not in statistics:
            continue
        weight = module.weight
        layer = config.for_layer(name, weight in ends)
        if layer is None or QUANTIZERS[layer.quantizer].needs != needs:
            continue
        if weight.numel() >= max(config.min_elements, 1) and holders[id(weight)] == 1:
            check_finite(weight, name)
            key = f"{inside[module]}.weight".removeprefix(".")
            found[name] = ToLearn(weight, layer, statistics[name], key)
    return found


@contextlib.contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Models of transformers hand their blocks a cache of keys and values, to which each call adds."""
    config: Any = getattr(model, "config", None)
    if not getattr(config, "use_cache", False):
        yield
        return
    config.use_cache = False
    try:
        yield
    finally:
        config.use_cache = True


def _targets(model: nn.Module, block: nn.Module, run: Callable[[], None], done: Mapping[Tensor, PackedWeight]) -> list[Call]:
    """What ``block`` is given by those before it with the codes ``done``, and what it should return."""
    targets = [call.output for call in _calls(block, run)]
    with substituted(model, done):
        return [dataclasses.replace(call, output=t) for call, t in zip(_calls(block, run), targets, strict=True)]


def _calls(block: nn.Module, run: Callable[[], None]) -> list[Call]:
    calls: list[Call] = []

    def note(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        calls.append(Call(arguments, keywords, _first(output)))

    hook = block.register_forward_hook(note, with_kwargs=True)
    try:
        run()
    finally:
        hook.remove()
    return calls


def _first(output: Any) -> Tensor:
    while not isinstance(output, Tensor):
        output = next(iter(output.values())) if isinstance(output, Mapping) else output[0]
    return output


def _learn(block: nn.Module, layers: Mapping[str, ToLearn], calls: Sequence[Call]) -> dict[str, Learned]:
    """Signed gradient descent with a falling rate. What is no better than the codes of the start is not kept."""
    if not calls:
        log.warning("codes of %s are not learned: the block around it is never called", next(iter(layers)))
        return {}
    with one_thread():
        roundings = {name: LearnedRounding(each.weight.detach(), each.format, each.statistics) for name, each in layers.items()}
        generator, loss = torch.Generator().manual_seed(0), functools.partial(_loss, block, layers, roundings)
        begun, before = {name: each.snapshot() for name, each in roundings.items()}, float(loss(calls))
        for step in range(STEPS):
            with torch.enable_grad():
                variables = [variable for each in roundings.values() for variable in each.variables]
                gradients = iter(torch.autograd.grad(loss(_some(calls, generator)), variables))
            for each in roundings.values():
                each.step([next(gradients) for _ in each.variables], (1 - step / STEPS) / STEPS)
        after = float(loss(calls))
    log.info("learned %s: squared error of the block %.3g, before %.3g", next(iter(layers)), after, before)
    return {name: each.learned(each.variables if after < before else begun[name]) for name, each in roundings.items()}


def _loss(
    block: nn.Module, layers: Mapping[str, ToLearn], roundings: Mapping[str, LearnedRounding], calls: Sequence[Call]
) -> Tensor:
    """The squared error of what ``block`` returns."""
    weights = {layers[name].key: rounding.dequantized() for name, rounding in roundings.items()}
    outputs = (_first(functional_call(block, weights, call.arguments, dict(call.keywords))) for call in calls)
    return torch.stack([(out - call.output).float().square().sum() for out, call in zip(outputs, calls, strict=True)]).sum()


def _some(calls: Sequence[Call], generator: torch.Generator) -> list[Call]:
    """Calls in random order, until they have :data:`ROWS`."""
    chosen: list[Call] = []
    rows = 0
    for index in torch.randperm(len(calls), generator=generator).tolist():
        if rows >= ROWS:
            break
        chosen.append(calls[index])
        rows += calls[index].output[..., 0].numel()
    return chosen

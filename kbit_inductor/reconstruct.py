"""Codes learned block by block, so that each block of a model returns what it did in float.

The blocks are learned in their order. What a block is given comes from those before it with the codes that they have by then, and
what it should return is what the float model's block does, so that a block also makes good what those before have lost (block-wise
reconstruction: Li et al., "BRECQ", 2021; the roundings: :mod:`kbit_inductor.quantizers.autoround`).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from kbit_inductor.config import Config, LayerConfig
from kbit_inductor.logs import logger
from kbit_inductor.packing import PackedWeight, check_finite, pack
from kbit_inductor.progress import Progress
from kbit_inductor.quantizers import QUANTIZERS, Learned, LearnedRounding, Statistics
from kbit_inductor.quantizers.gptq import one_thread
from kbit_inductor.substitution import substituted

log = logger("pack")
STEPS = 200
ROWS = 1024  # at least, of one step, of all that there are


@dataclass(frozen=True)
class Call:
    """A call of a block, and the tensor that it returned, or the first of those."""

    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]
    output: Tensor


def learn(model: nn.Module, run: Callable[[], None], config: Config, statistics: Mapping[str, Statistics]) -> dict[str, Statistics]:
    """``statistics`` by layer name, with codes for those layers whose quantizer asks for outputs and that are in a block.

    What is learned is learned by one thread, so that the codes are as reproducible as what the model's own passes return.

    Args:
        model: on float weights.
        run: calls it on all the data.
        config: the options of the layers.
        statistics: of what the layers are given.
    """
    found, done = dict(statistics), dict[Tensor, PackedWeight]()
    waiting = [(block, layers) for block in blocks(model) if (layers := _layers(model, block, config, statistics))]
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        _without_cache(model),
        Progress(len(waiting), "learning roundings") as progress,
    ):
        for block, layers in waiting:
            targets = [call.output for call in _calls(block, run)]
            with substituted(model, done):
                calls = [dataclasses.replace(c, output=t) for c, t in zip(_calls(block, run), targets, strict=True)]
            if not calls:
                log.warning("codes of %s are not learned: the block around it is never called", next(iter(layers)))
                continue
            for name, learned in _learn(block, layers, calls, config, statistics).items():
                found[name] = dataclasses.replace(statistics[name], learned=learned)
                layer = config.for_layer(name)
                weight = layers[name].weight
                if layer is not None:
                    done[weight] = pack(weight.detach(), layer, name, statistics=found[name])
            progress.advance(next(iter(layers)))
    return found


def learns(model: nn.Module, config: Config) -> bool:
    """Whether codes of a layer of ``model`` are to be learned. They are for bits that are known."""
    names = (name for name, module in model.named_modules() if type(module) is nn.Linear)
    return config.bits != "auto" and any(_is_learned(config.for_layer(name)) for name in names)


def _is_learned(layer: LayerConfig | None) -> bool:
    return layer is not None and QUANTIZERS[layer.quantizer].needs == "outputs"


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


def _layers(model: nn.Module, block: nn.Module, config: Config, statistics: Mapping[str, Statistics]) -> dict[str, nn.Linear]:
    """The layers of ``block``, by their names in ``model``, whose codes are to be learned."""
    own = set(block.modules())
    found = {}
    for name, module in model.named_modules():
        if type(module) is not nn.Linear or module not in own or module.weight.numel() < max(config.min_elements, 1):
            continue
        if name in statistics and _is_learned(config.for_layer(name)):
            found[name] = module
    return found


@contextlib.contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
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


def _learn(
    block: nn.Module, layers: Mapping[str, nn.Linear], calls: Sequence[Call], config: Config, statistics: Mapping[str, Statistics]
) -> dict[str, Learned]:
    """Signed gradient descent with a falling rate. What is no better than the codes of the start is not kept."""
    roundings: dict[str, LearnedRounding] = {}
    for name, layer in layers.items():
        check_finite(layer.weight, name)
        chosen = config.for_layer(name)
        if chosen is not None:
            roundings[name] = LearnedRounding(layer.weight.detach(), chosen.format(layer.in_features), statistics[name])
    own = {module: f"{name}.weight".removeprefix(".") for name, module in block.named_modules()}
    keys = {name: own[layer] for name, layer in layers.items()}

    def loss(chosen: Sequence[Call]) -> Tensor:
        weights = {keys[name]: rounding.dequantized() for name, rounding in roundings.items()}
        outputs = (_first(functional_call(block, weights, call.arguments, dict(call.keywords))) for call in chosen)
        return torch.stack([(out - call.output).float().square().sum() for out, call in zip(outputs, chosen, strict=True)]).sum()

    generator = torch.Generator().manual_seed(0)
    with one_thread():
        begun, before = {name: each.snapshot() for name, each in roundings.items()}, float(loss(calls))
        for step in range(STEPS):
            with torch.enable_grad():
                variables = [variable for each in roundings.values() for variable in each.variables]
                gradients = iter(torch.autograd.grad(loss(_some(calls, generator)), variables))
            for each in roundings.values():
                each.step([next(gradients) for _ in each.variables], (1 - step / STEPS) / STEPS)
        after = float(loss(calls))
    log.info("learned %s: squared error of the block %.3g, before %.3g", next(iter(layers)), after, before)
    kept = {name: each.variables if after < before else begun[name] for name, each in roundings.items()}
    return {name: each.learned(kept[name]) for name, each in roundings.items()}


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

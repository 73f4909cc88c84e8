"""Run a model on a little data and keep what quantizers can use: moments of the inputs of each layer."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kbit_inductor import logs
from kbit_inductor._compat import uncompiled
from kbit_inductor.calibrating.distillation import distill
from kbit_inductor.calibrating.reconstruct import learn
from kbit_inductor.calibration import Calibration
from kbit_inductor.config import Config
from kbit_inductor.errors import EmptyCalibrationError, InvalidOptionError, NonFiniteActivationError
from kbit_inductor.progress import Progress
from kbit_inductor.quantizers import QUANTIZERS, Statistics
from kbit_inductor.quantizers.registry import LEARNING, WITH_HESSIAN

log = logs.logger("pack")
MAX_LENGTH = 512  # tokens of a text


@torch.no_grad()
def calibrate(
    model: nn.Module,
    data: Any,
    config: Config | Mapping[str, Any] | None = None,
    *,
    tokenizer: Callable[..., Mapping[str, Any]] | None = None,
    resume: str | os.PathLike[str] | None = None,
) -> Calibration:
    """The statistics of what the layers of ``model`` are given when it runs on ``data``, once, for the option ``calibration``.

    A thousand rows (tokens of a language model) give most of what there is to gain. A layer is a module with a matrix ``weight``
    that is called with a floating tensor, as ``nn.Linear`` is. A Hessian is kept, ``4 * K ** 2`` bytes, where the quantizer of the
    layer asks for it. Where it asks for codes that are learned, the blocks of the model (``"autoround"``), or all of it
    (``"distill"``), are run many times: seconds for each million of weights, for bits that are known.

    Args:
        model: on float weights, in eager, as it will be used.
        data: a batch, or an iterable of batches such as a ``DataLoader``. A batch is a tensor, the model's first argument; a tuple,
            its arguments; a mapping, its keywords; or a text, which the tokenizer turns into keywords and which is cut after 512
            tokens. A list or tuple of batches is an iterable of them.
        config: says which layers, and by their quantizers what is kept.
        tokenizer: of texts, as Hugging Face's are called.
        resume: a folder, made if need be, in which codes that are learned are kept block by block. The same call, after it was
            interrupted, takes them from there and goes on. None to keep nothing.

    Raises:
        CorruptModelError: a file in ``resume`` that is damaged.
        EmptyCalibrationError: ``data`` has no batch, or no layer was given a row.
        NonFiniteActivationError: a layer was given NaN or an infinity.
        InvalidOptionError: a text without a tokenizer.
    """
    logs.configure()
    model, resolved = uncompiled(model), Config.from_options(config)
    if learns(model, resolved):  # which takes more than one pass
        data = [dict(keywords) or arguments for arguments, keywords in batches(data, tokenizer, model)]
    found = observe(model, data, resolved, tokenizer)
    check_reached(found)
    statistics = {name: each for name, each in found.items() if each is not None}
    if learns(model, resolved):
        folder = None if resume is None else Path(resume)
        statistics = learn(model, lambda: run(model, data), resolved, statistics, folder)
        statistics = distill(model, list(batches(data, None, model)), resolved, statistics, folder)
    return of_layers(model, statistics)


def of_layers(model: nn.Module, statistics: Mapping[str, Statistics]) -> Calibration:
    """The calibration of ``model`` with ``statistics`` by layer name."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    weights: dict[str, Tensor] = {name: model.get_submodule(name).weight for name in statistics}  # type: ignore[misc]
    return Calibration(weights, {n: s.evened() if id(weights[n]) in tables else s for n, s in statistics.items()})


def observe(
    model: nn.Module,
    data: Any,
    config: Config,
    tokenizer: Callable[..., Mapping[str, Any]] | None = None,
    hessians_of: Container[str] | None = None,
) -> dict[str, Statistics | None]:
    """Statistics of the float layers of ``model`` by name; None of those that ``data`` gives no row.

    Args:
        model: to be run once.
        data: as for :func:`calibrate`.
        config: says which layers, and which of them need a Hessian.
        tokenizer: of texts.
        hessians_of: the only layers that get theirs; None for all.
    """
    meters = {name: meter for name, module in model.named_modules() if (meter := _meter(name, module, config)) is not None}
    for name, meter in meters.items():
        meter.with_hessian &= hessians_of is None or name in hessians_of
    hooks = [meter.module.register_forward_pre_hook(meter) for meter in meters.values()]
    try:
        run(model, data, tokenizer)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: meter.statistics() if meter.rows else None for name, meter in meters.items()}


def check_reached(found: Mapping[str, Statistics | None]) -> None:
    """Warn of layers without statistics.

    Raises:
        EmptyCalibrationError: all are.
    """
    missed = [name for name, statistics in found.items() if statistics is None]
    if len(missed) == len(found):
        raise EmptyCalibrationError("calibration saw no row of any layer; give at least one batch that is not empty")
    if missed:
        log.warning(
            "calibration never reached %d of %d layers (%s, …); they are quantized without statistics. Give data that uses them, "
            "or skip them", len(missed), len(found), missed[0],
        )  # fmt: skip


def learns(model: nn.Module, config: Config) -> bool:
    """Whether codes of a layer of ``model`` are to be learned. They are for bits that are known."""
    layers = (config.for_layer(name) for name, module in model.named_modules() if type(module) is nn.Linear)
    return config.bits != "auto" and any(layer is not None and QUANTIZERS[layer.quantizer].needs in LEARNING for layer in layers)


def run(model: nn.Module, data: Any, tokenizer: Callable[..., Mapping[str, Any]] | None = None) -> None:
    """Call ``model`` on each batch of ``data``, for its hooks' sake.

    Raises:
        EmptyCalibrationError: there is none.
    """
    count = 0
    with Progress(None, "calibrating") as progress:
        for arguments, keywords in batches(data, tokenizer, model):
            model(*arguments, **keywords)
            count += 1
            progress.advance(f"batch {count}")
    if not count:
        raise EmptyCalibrationError("the calibration data has no batch; give at least one (an exhausted iterator has none)")


def batches(
    data: Any, tokenizer: Callable[..., Mapping[str, Any]] | None, model: nn.Module
) -> Iterator[tuple[tuple[Any, ...], Mapping[str, Any]]]:
    """The arguments and keywords of each call of ``model``; see :func:`calibrate` for what ``data`` may be."""
    several = isinstance(data, Iterable) and not isinstance(data, (Tensor, Mapping, str))
    for batch in data if several else (data,):
        if isinstance(batch, str):
            if tokenizer is None:
                raise InvalidOptionError("calibration data has a text, and no tokenizer is given; pass tokenizer=…")
            device = next(iter(model.parameters())).device
            encoded = tokenizer(batch, return_tensors="pt", truncation=True, max_length=MAX_LENGTH)
            yield (), {name: value.to(device) for name, value in encoded.items() if name != "token_type_ids"}
        elif isinstance(batch, Mapping):
            yield (), batch
        else:
            yield (tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)), {}


def _meter(name: str, module: nn.Module, config: Config) -> _Meter | None:
    weight = module._parameters.get("weight")
    layer = config.for_layer(name)
    if weight is None or weight.dim() != 2 or isinstance(module, nn.Embedding) or layer is None:
        return None
    return _Meter(name, module, QUANTIZERS[layer.quantizer].needs in WITH_HESSIAN)


@dataclasses.dataclass
class _Meter:
    """A forward pre-hook that sums up moments of the inputs of ``module``."""

    name: str
    module: nn.Module
    with_hessian: bool
    rows: int = 0
    sums: Tensor | None = None
    squares: Tensor | None = None
    products: Tensor | None = None

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if not arguments or not isinstance(arguments[0], Tensor) or not arguments[0].is_floating_point():
            return
        x = arguments[0].detach().reshape(-1, arguments[0].shape[-1]).float()
        squares = x.square().sum(dim=0, dtype=torch.float64)
        if not bool(torch.isfinite(squares).all()):
            raise NonFiniteActivationError(
                f"layer {self.name!r} is given NaN or an infinity by the calibration data; mend the data, run the model in float32 "
                "or bfloat16, or leave the data out"
            )
        self.rows += len(x)
        self.squares = squares if self.squares is None else self.squares + squares
        sums = x.sum(dim=0, dtype=torch.float64)
        self.sums = sums if self.sums is None else self.sums + sums
        if self.with_hessian:
            self.products = x.t() @ x if self.products is None else self.products.addmm_(x.t(), x)

    def statistics(self) -> Statistics:
        """Means of what was summed up."""
        if self.squares is None or self.sums is None:
            raise LookupError(f"{self.name} was given nothing")
        hessian = None if self.products is None else self.products / self.rows
        return Statistics((self.squares / self.rows).float(), hessian, self.rows, mean=(self.sums / self.rows).float())

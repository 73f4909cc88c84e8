"""Swap the modules of a model for packed ones in place, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kbit_inductor import logs
from kbit_inductor._compat import uncompiled
from kbit_inductor.bits.planner import plan
from kbit_inductor.calibrating.calibrate import calibrate
from kbit_inductor.calibrating.streaming import can_stream, parts, stream
from kbit_inductor.calibration import Calibration, lacking, warn_lacking
from kbit_inductor.config import Config, LayerConfig
from kbit_inductor.ends import ends_of_model
from kbit_inductor.models.modules import PackedEmbedding, PackedLinear, PackedMatrix, matrix_of, run
from kbit_inductor.overrides import check_names
from kbit_inductor.packing import WEIGHT_DTYPES, check_finite, pack
from kbit_inductor.progress import Progress
from kbit_inductor.side import with_shift
from kbit_inductor.weights.release import Trimmer, trim_heap

log = logs.logger("pack")


@dataclass(frozen=True)
class Place:
    """A module that is to be swapped, where it is in the model.

    Attributes:
        parent: that holds it.
        key: under which.
        name: from the model on.
        module: itself.
    """

    parent: nn.Module
    key: str
    name: str
    module: nn.Module

    def put(self, module: nn.Module) -> None:
        """Put ``module`` there."""
        self.parent._modules[self.key] = module.train(self.module.training)


Waiting = tuple[Tensor, LayerConfig, list[Place]]
"""A weight that is to be packed, how, and the modules that have it."""


@torch.no_grad()
def quantize_(
    model: nn.Module,
    config: Config | Mapping[str, Any] | None = None,
    calibration: Any = None,
    *,
    tokenizer: Callable[..., Mapping[str, Any]] | None = None,
) -> nn.Module:
    """Swap every ``nn.Linear`` and ``nn.Embedding`` of ``model`` for a module on a packed weight, in place, and return ``model``.

    The weights are packed one after the other, and the floats of each are let go of before the next. Tied weights stay one. What
    stays in float, and why, is logged (``KBIT_LOGS=pack``): what ``skip`` names, small weights, modules with hooks or with a
    ``forward`` of their own, weights that other modules use too, and all that is no matrix of these two kinds of module.

    Args:
        model: with float weights. It may not be one of the two kinds of module itself, since it is changed in place. Of a model
            that ``torch.compile`` has returned, the one that was compiled is changed.
        config: the options, as for ``torch.compile(model, backend="kbit", options=config)``. Those about compiling change nothing.
        calibration: data as :func:`kbit_inductor.calibrate` takes it, or what that has returned. With data, and a quantizer that
            needs Hessians, those of one block are there at a time, and the data is run once for each block.
        tokenizer: of texts among the data.

    Raises:
        UnknownOptionError, InvalidOptionError: an option that does not exist, or a value that it does not take.
        UnmatchedOverrideError: an entry of ``overrides`` or ``skip`` that names no layer.
        NonFiniteWeightError: a weight with NaN or an infinity; the model is as it was.
        BudgetError, EmptyCalibrationError, NonFiniteActivationError: as :func:`plan` and :func:`calibrate` raise them.
    """
    logs.configure()
    resolved, given = Config.from_options(config), uncompiled(model)
    if resolved.bits == "auto":
        data = None if isinstance(calibration, Calibration) else calibration
        resolved = plan(given, resolved, data, tokenizer=tokenizer).apply(resolved)
    waiting = list(_to_swap(given, resolved))
    for weight, _, places in waiting:
        check_finite(weight, places[0].name)
    if not waiting:
        _warn_nothing(given)
    statistics = calibration if isinstance(calibration, Calibration) else resolved.calibration
    with Progress(len(waiting), "packing weights") as progress:
        if waiting and statistics is None and calibration is not None and can_stream(given, resolved):
            _swap_by_blocks(given, waiting, calibration, resolved, tokenizer, progress)
        else:
            if statistics is None and calibration is not None:
                statistics = calibrate(given, calibration, resolved, tokenizer=tokenizer)
            for _, layer, _ in waiting if statistics is None else ():
                for reason in lacking(layer, None):
                    warn_lacking(reason)
            _swap_all(waiting, statistics, progress)
    trim_heap()
    return model


def _swap_by_blocks(
    model: nn.Module,
    waiting: list[Waiting],
    data: Any,
    config: Config,
    tokenizer: Callable[..., Mapping[str, Any]] | None,
    progress: Progress,
) -> None:
    """Pack ``waiting``, which is empty then, with the statistics of one block at a time."""
    holders = [[(place.name, place.module) for place in places] for _, _, places in waiting]
    together = [[waiting[index] for index in each] for each in parts(model, holders)]
    waiting.clear()
    names = [[place.name for _, _, places in each for place in places] for each in together]
    statistics = stream(model, data, config, tokenizer, names)
    for each in together:  # nobody holds the statistics of one while those of the next are found
        _swap_all(each, next(statistics), progress)


def _swap_all(waiting: list[Waiting], statistics: Calibration | None, progress: Progress) -> None:
    """Pack ``waiting``, which is empty then."""
    # The largest last: what its conversion takes besides is there when few floats are left.
    waiting.sort(key=lambda one: -one[0].numel())
    trimmer = Trimmer()
    while waiting:
        elements = waiting[-1][0].numel()
        progress.advance(_swap(*waiting.pop(), statistics))
        trimmer.converted(elements)


@torch.no_grad()
def dequantize_(model: nn.Module) -> nn.Module:
    """Swap every module on a packed weight for an ``nn.Linear`` or ``nn.Embedding`` on its float values, in place.

    The floats have the dtype that the model was quantized from, or cast to since. Tied weights stay one. Returns ``model``.
    """
    floats: dict[PackedMatrix, nn.Parameter] = {}
    made: dict[nn.Module, nn.Module] = {}
    for place in list(_places(model)):
        matrix = matrix_of(place.module)
        if matrix is None:
            continue
        if matrix not in floats:
            floats[matrix] = nn.Parameter(matrix.dequantize())
        if place.module not in made:
            made[place.module] = _float_module(place.module, floats[matrix], matrix)
        place.put(made[place.module])
    return model


def packed_matrices(model: nn.Module) -> dict[PackedMatrix, list[str]]:
    """Each packed weight of ``model`` with the names of the layers that it belongs to."""
    names: dict[PackedMatrix, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if (matrix := matrix_of(module)) is not None:
            names.setdefault(matrix, []).append(name)
    return names


def _to_swap(model: nn.Module, config: Config) -> Iterator[Waiting]:
    """Each weight that is to be packed."""
    places: dict[Tensor, list[Place]] = {}
    for place in _places(model):
        parameter = place.module._parameters.get("weight")
        if parameter is not None:
            places.setdefault(parameter, []).append(place)
    check_names(config, [place.name for together in places.values() for place in together], model)
    holders, ends = _holders(model), ends_of_model(model)
    for weight, together in places.items():
        skipped = any(config.for_layer(place.name) is None for place in together)
        layer = None if skipped else config.for_layer(together[0].name, weight in ends)
        reason = "skipped by the option 'skip'" if layer is None else _stays(weight, together, holders[weight], config)
        if layer is None or reason:
            log.info("%s stays in float: %s", together[0].name, reason)
        elif layer != layer.without_side and any(isinstance(place.module, nn.Embedding) for place in together):
            log.info("%s has no floats beside its codes: it is looked up", together[0].name)
            yield weight, layer.without_side, together
        else:
            yield weight, layer, together


def _warn_nothing(model: nn.Module) -> None:
    kind = type(model).__name__
    why = "KBIT_LOGS=pack tells of each of its layers why"
    if type(model) in (nn.Linear, nn.Embedding):
        why = "it is a layer itself, which cannot be swapped in place; put it into a module, nn.Sequential for one"
    log.warning("quantize_ has packed no weight of the %s: %s", kind, why)


def _places(model: nn.Module) -> Iterator[Place]:
    """All modules of ``model`` but itself; one that is in several places once for each."""
    for name, module in model.named_modules(remove_duplicate=False):
        for key, child in module._modules.items():
            if child is not None:
                yield Place(module, key, f"{name}.{key}".removeprefix("."), child)


def _holders(model: nn.Module) -> dict[Tensor, set[nn.Module]]:
    """The modules that have each parameter."""
    holders: dict[Tensor, set[nn.Module]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                holders.setdefault(parameter, set()).add(module)
    return holders


def _stays(weight: Tensor, places: list[Place], holders: set[nn.Module], config: Config) -> str:
    """Why ``weight`` stays in float, or ""."""
    for place in places:
        if type(place.module) not in (nn.Linear, nn.Embedding):
            return f"{place.name} is a {type(place.module).__name__}, neither nn.Linear nor nn.Embedding"
        if getattr(place.module, "max_norm", None) is not None:
            return "max_norm rescales its rows at every call"
        if place.module._forward_hooks or place.module._forward_pre_hooks:
            return f"{place.name} has hooks"
    if holders != {place.module for place in places}:
        return "another module has the same weight"
    if weight.dtype not in WEIGHT_DTYPES:
        return f"its dtype is {weight.dtype}"
    if weight.is_meta:
        return "it is on the meta device, without values"
    if weight.numel() < config.min_elements:
        return f"it is too small: {weight.numel()} elements, fewer than min_elements={config.min_elements}"
    return ""


def _swap(weight: Tensor, layer: LayerConfig, places: list[Place], calibration: Calibration | None) -> str:
    """Pack ``weight`` and put packed modules in all ``places``."""
    name = places[0].name
    statistics = None if calibration is None else calibration.of(weight, weight.size(1))
    packed = pack(weight.detach(), layer, name, statistics=statistics)
    matrix = PackedMatrix(packed, weight.size(0), weight.dtype)
    log.info("packed %s: %d bits, %d bytes, relative error %.3g", name, layer.bits, matrix.packed.nbytes, packed.error)
    made: dict[nn.Module, nn.Module] = {}
    for place in places:
        if place.module not in made:
            made[place.module] = packed_module(place.module, matrix)
        place.put(made[place.module])
    return name


def packed_module(module: nn.Module, matrix: PackedMatrix) -> nn.Module:
    """What takes the place of ``module``, an ``nn.Linear`` or ``nn.Embedding``, with ``matrix`` for its weight."""
    if isinstance(module, nn.Embedding):
        return PackedEmbedding(matrix, module.padding_idx)
    return PackedLinear(matrix, module._parameters["bias"])


def _float_module(module: nn.Module, weight: nn.Parameter, matrix: PackedMatrix) -> nn.Module:
    made: nn.Linear | nn.Embedding
    if isinstance(module, nn.Embedding):
        made = nn.Embedding(weight.size(0), weight.size(1), padding_idx=module.padding_idx, device="meta")
    else:
        made = nn.Linear(weight.size(1), weight.size(0), bias=False, device="meta")
        bias, side = module._parameters["bias"], matrix.side
        if side is not None and side.shift is not None:
            bias = nn.Parameter(with_shift(run, bias, side.shift), requires_grad=bias is not None and bias.requires_grad)
        made.register_parameter("bias", bias)
    made.weight = weight
    return made

"""From a model and a budget to a plan.

With data: the divergence that the rounding of one unit causes is measured at :data:`PROBE_BITS`; at other bits it goes as the
squared error of the weight does (the linearity theorem of Malinovskii et al., "HIGGS", 2024: the loss grows by a sum over layers
of a factor times the relative squared error). The best choice under the budget is then found exactly, and the model is run with it,
and with uniform bits: a plan that diverges more than those is not taken.

Without data the factor is 1 for tables and the head, which get no fewer bits than uniform ones, and a share of it for other layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kbit_inductor._compat import uncompiled
from kbit_inductor.bits.budget import LEAST_BITS, MOST_BITS, Budget
from kbit_inductor.bits.divergence import Divergence
from kbit_inductor.bits.knapsack import choose
from kbit_inductor.bits.plan import Plan, PlannedLayer
from kbit_inductor.bits.units import Unit, find_units
from kbit_inductor.calibrating.calibrate import batches, calibrate
from kbit_inductor.calibration import Calibration
from kbit_inductor.config import Config
from kbit_inductor.errors import BudgetError, EmptyCalibrationError, InvalidOptionError
from kbit_inductor.packing import PackedWeight
from kbit_inductor.progress import Progress

PROBE_BITS = 3


@torch.no_grad()
def plan(
    model: nn.Module,
    config: Config | Mapping[str, Any],
    calibration: Any = None,
    *,
    tokenizer: Callable[..., Mapping[str, Any]] | None = None,
) -> Plan:
    """The bits of each layer of ``model`` under the budget of ``config``, one of bits, bytes or time.

    The same for the same model and data. ``plan(...).apply(config)`` is the config to compile with.

    Args:
        model: on its float weights, in eager.
        config: the options. Bits that ``overrides`` set stay, and what ``skip`` names stays in float.
        calibration: data as :func:`kbit_inductor.calibrate` takes it; about a thousand rows, since the model runs on them once for
            each layer. None: bits by the error of the weights alone.
        tokenizer: of texts.

    Raises:
        BudgetError: even the least bits do not fit.
        InvalidOptionError: ``bits`` is not ``"auto"``.
        EmptyCalibrationError: data without a batch.
    """
    model, resolved = uncompiled(model), Config.from_options(config)
    if resolved.bits != "auto":
        raise InvalidOptionError(f"plan chooses bits where bits='auto'; bits is {resolved.bits!r}")
    if calibration is None:
        units = find_units(model, resolved)
        return solve(units, resolved, _bytes_in_float(model, units))
    data = list(batches(calibration, tokenizer, model))
    if not data:
        raise EmptyCalibrationError("the calibration data has no batch; give at least one")
    statistics = resolved.calibration or calibrate(model, [dict(keywords) or arguments for arguments, keywords in data], resolved)
    units = find_units(model, resolved, siblings(model, data[0]))
    divergence = Divergence(model, data)
    probe(units, divergence, statistics)
    return solve(units, resolved, _bytes_in_float(model, units), divergence, statistics)


def siblings(model: nn.Module, batch: tuple[tuple[Any, ...], Mapping[str, Any]]) -> list[list[str]]:
    """The names of layers that are given the very same tensor: they may become one kernel."""
    shared: dict[int, tuple[Tensor, list[str]]] = {}  # the tensors are held, lest another one gets the identity

    def note(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            if arguments and isinstance(arguments[0], Tensor):
                shared.setdefault(id(arguments[0]), (arguments[0], []))[1].append(name)

        return hook

    layers = [(name, module) for name, module in model.named_modules() if isinstance(module._parameters.get("weight"), Tensor)]
    hooks = [
        module.register_forward_pre_hook(note(name))
        for name, module in layers
        if module.weight.dim() == 2 and not isinstance(module, nn.Embedding)
    ]
    try:
        model(*batch[0], **batch[1])
    finally:
        for hook in hooks:
            hook.remove()
    return [names for _, names in shared.values() if len(names) > 1]


def probe(units: Sequence[Unit], divergence: Divergence, calibration: Calibration) -> None:
    """Measure what an error of each unit costs: its divergence over its error, at :data:`PROBE_BITS`.

    By the clip search: a quantizer that is fitted to the outputs on this very data would hide there what it costs on other data.
    """
    with Progress(len(units), "probing layers") as progress:
        for unit in units:
            unit.measure(PROBE_BITS, calibration)
            caused = divergence.of(unit.pack(PROBE_BITS, calibration, "clip"))
            error = unit.errors[PROBE_BITS]
            unit.factor = max(caused, 0.0) / error if error else 0.0
            progress.advance(unit.names[0])


def solve(
    units: Sequence[Unit],
    config: Config,
    bytes_in_float: int = 0,
    divergence: Divergence | None = None,
    calibration: Calibration | None = None,
) -> Plan:
    """The best bits for ``units`` under the budget of ``config``, checked by ``divergence`` if given.

    Raises:
        BudgetError: even the least bits do not fit.
    """
    for unit in units:
        for each in range(LEAST_BITS, MOST_BITS + 1):
            if each not in unit.errors and unit.pinned in (None, each):
                unit.measure(each, calibration)
    if divergence is None:
        _weigh(units)
    budget = Budget.of(config, units, bytes_in_float)
    uniform = budget.uniform(units)
    least = min(uniform, 2)  # 1 bit is for budgets that force it
    choices = [_choices(unit, least, uniform if unit.is_end and divergence is None else least) for unit in units]
    options = [[(budget.size(u, b), u.factor * u.errors[b]) for b in bits] for u, bits in zip(units, choices, strict=True)]
    taken = choose(options, budget.limit)
    if taken is None:  # floors may ask for more than uniform bits do
        raise BudgetError(f"{budget.text} is too little for bits='auto'; lower the bits that 'overrides' set, or give more")
    bits = [choice[index] for choice, index in zip(choices, taken, strict=True)]
    even = [unit.pinned or uniform for unit in units]
    if divergence is None:
        told = f"the least sum of relative errors under {budget.text}; not checked, there was no data"
        return _report(units, bits, f"{told}; tables and the head no fewer than uniform {uniform} bits", {})
    found = {
        "plan": _divergence(units, bits, divergence, calibration),
        "uniform": _divergence(units, even, divergence, calibration),
    }
    if found["plan"] <= found["uniform"]:
        told = f"diverges by {found['plan']:.3g}, uniform {uniform} bits by {found['uniform']:.3g}"
        return _report(units, bits, f"the least estimated divergence under {budget.text}: {told}", found)
    told = f"the plan diverges by {found['plan']:.3g}, uniform {uniform} bits by {found['uniform']:.3g}, so these are taken"
    return _report(units, even, f"under {budget.text} {told}", found)


def _weigh(units: Sequence[Unit]) -> None:
    """What an error costs where nothing was measured: that of a table or the head is the model's own, and that of a layer between
    them one of many in the sum that residual connections make, about two for each that writes to it."""
    inner = sum(len(unit.weights) for unit in units if not unit.is_end)
    for unit in units:
        unit.factor = 1.0 if unit.is_end else len(unit.weights) * min(1.0, 2 / inner)


def _choices(unit: Unit, least: int, floor: int) -> list[int]:
    return [unit.pinned] if unit.pinned else list(range(max(least, floor), MOST_BITS + 1))


def _divergence(units: Sequence[Unit], bits: Sequence[int], divergence: Divergence, calibration: Calibration | None) -> float:
    packed: dict[Tensor, PackedWeight] = {}
    for unit, chosen in zip(units, bits, strict=True):
        packed |= unit.pack(chosen, calibration)
    return divergence.of(packed)


def _report(units: Sequence[Unit], bits: Sequence[int], verdict: str, divergence: Mapping[str, float]) -> Plan:
    total = sum(unit.factor * unit.errors[chosen] for unit, chosen in zip(units, bits, strict=True))
    layers = []
    for unit, chosen in zip(units, bits, strict=True):
        cost = unit.factor * unit.errors[chosen]
        reason = "set by overrides" if unit.pinned else _reason(unit, chosen, cost / total if total else 0.0)
        shapes = tuple((weight.size(0), weight.size(1)) for weight in unit.weights)
        layers.append(PlannedLayer(unit.names, shapes, chosen, unit.nbytes[chosen], cost, reason))
    return Plan(tuple(layers), verdict, dict(divergence))


def _reason(unit: Unit, bits: int, share: float) -> str:
    step = ""
    if bits < MOST_BITS:
        gain = unit.factor * (unit.errors[bits] - unit.errors[bits + 1]) / max(unit.elements, 1) * 1e6
        step = f", one bit more would save {gain:.2g} per million weights"
    return f"error {unit.errors[bits]:.2g}, {share:.0%} of the cost{step}"


def _bytes_in_float(model: nn.Module, units: Sequence[Unit]) -> int:
    planned = {id(weight) for unit in units for weight in unit.weights}
    held = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.nbytes for key, tensor in held.items() if key not in planned)

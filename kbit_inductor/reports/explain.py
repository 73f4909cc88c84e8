"""What the backend does with a model, layer by layer."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Group
from torch import Tensor, fx, nn

from kbit_inductor import backend
from kbit_inductor._compat import graph_breaks, uncompiled
from kbit_inductor.capture import Context, Use
from kbit_inductor.config import Config
from kbit_inductor.errors import KbitError, ModelCallError
from kbit_inductor.models.modules import PackedMatrix, matrix_of
from kbit_inductor.packing import PackedWeight
from kbit_inductor.printed import printed
from kbit_inductor.reports.expectation import Clock
from kbit_inductor.reports.findings import Findings, LayerReport
from kbit_inductor.reports.page import Steps, render
from kbit_inductor.reports.table import table
from kbit_inductor.weights.release import is_released
from kbit_inductor.weights.store import STORE, Slot
from kbit_inductor.weights.views import WeightView

Key = tuple[int, "str | None", WeightView]
"""The identity of a parameter, what is computed from it, and the part of that: one matrix of the model."""


class Explanation(Findings):
    """The answer of :func:`explain`. ``print`` it, or give it to a rich console."""

    def __rich__(self) -> Group:
        return table(self)

    def __str__(self) -> str:
        return printed(self)


def explain(
    model: Any,
    *inputs: Any,
    config: Config | Mapping[str, Any] | None = None,
    html: str | Path | None = None,
    device: str | torch.device | None = None,
    **keywords: Any,
) -> Explanation:
    """What ``torch.compile(model, backend="kbit", options=config)`` does when called with ``inputs`` and ``keywords``.

    The model runs once, without gradients and on its float weights (or on packed ones where those were released); nothing is kept.

    Args:
        model: a module or function.
        inputs: its arguments.
        config: the options.
        html: where to write the same as a page that needs nothing else, with each graph before and after each pass.
        device: of which the cost model's times are told, whatever device the model is on: ``"h200"`` and the like, ``"cpu"`` or
            ``"cuda"``. None: that of each weight which is on a GPU.
        keywords: its arguments by name.

    Raises:
        ModelCallError: the model itself fails on ``inputs``.
        InvalidOptionError: a device that is not known, or an option as the compiled model would.
        UnknownOptionError, UnmatchedOverrideError, NonFiniteWeightError: as the compiled model would.
    """
    resolved = Config.from_options(config)
    original = uncompiled(model)
    clock = Clock(device)
    recorder = _Recorder(resolved, clock)
    breaks_before = graph_breaks()
    call_once(original, recorder, *inputs, **keywords)
    breaks = {reason: count - breaks_before.get(reason, 0) for reason, count in graph_breaks().items()}
    explanation = Explanation(
        (*recorder.reports.values(), *_packed_before(original, clock), *_unreached(original, recorder.seen)),
        recorder.graphs,
        {reason: count for reason, count in breaks.items() if count},
        recorder.fusions,
    )
    if html is not None:
        Path(html).write_text(render(explanation, recorder.steps.graphs), encoding="utf-8")
    return explanation


def call_once(model: Any, recorder: Any, *inputs: Any, **keywords: Any) -> None:
    """Call ``model`` once, without gradients, compiled by the backend ``recorder``.

    Raises:
        ModelCallError: the model itself fails.
        KbitError: what ``recorder`` raises.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    with torch.no_grad():
        try:
            torch.compile(run, backend=recorder)(*inputs, **keywords)
        except KbitError:
            raise
        except Exception as error:
            raise ModelCallError(f"the model cannot be explained since its call failed: {error}") from error


def as_it_is(gm: fx.GraphModule, inputs: Sequence[Any], context: Context) -> Any:
    """What runs a graph on its float weights, or on packed ones where those were released."""
    if any(is_released(inputs[weight.argument]) for weight in context.weights):
        return backend.compile_graph(gm, inputs, context.config)
    return gm.forward


class _Recorder:
    """A backend that reports on each graph and then runs it as it is."""

    def __init__(self, config: Config, clock: Clock) -> None:
        self.config = config
        self.clock = clock
        self.reports: dict[Key, LayerReport] = {}
        self.seen: set[int] = set()
        self.graphs = 0
        self.fusions: Counter[str] = Counter()
        self.steps = Steps()

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        self.graphs += 1
        try:
            _, context = backend.capture(gm, inputs, self.config, observers=[self.steps])
            self.seen |= {id(inputs[weight.argument]) for weight in context.weights}
            self.fusions += context.fusions
            for key, report in _reports(context, inputs, self.clock):
                self.reports[key] = _merged(self.reports.get(key), report)
        except KbitError as error:
            return backend.raiser(error)
        return as_it_is(gm, inputs, context)


def _merged(old: LayerReport | None, new: LayerReport) -> LayerReport:
    """One report for a matrix that several graphs use, or one under several names."""
    if old is None:
        return new
    names = dict.fromkeys((*old.name.split(" = "), *new.name.split(" = ")))
    reasons = tuple(dict.fromkeys((*old.reasons, *new.reasons)))
    merged = {
        "name": " = ".join(names),
        "uses": old.uses + new.uses,
        "kernels": old.kernels + new.kernels,
        "reasons": reasons,
        "expected": old.expected + new.expected,
    }
    return dataclasses.replace(new if new.matched else old, **merged)  # type: ignore[arg-type]


def _reports(context: Context, inputs: Sequence[Any], clock: Clock) -> Iterator[tuple[Key, LayerReport]]:
    for slot in context.slots:
        uses = [(use, choice) for use, choice in context.choices if _is_of(use, slot)]
        yield (id(inputs[slot.argument]), slot.form.derived, slot.form.view), _matched_report(context, slot, uses, inputs, clock)
    packed = {slot.argument for slot in context.slots}
    for weight in context.weights:
        if weight.argument not in packed and weight.derivation is None:
            size = inputs[weight.argument].nbytes if weight.value.layout == torch.strided else 0
            reasons = tuple(context.reasons.get(weight.name, ("no product uses it",)))
            shape = tuple(weight.value.shape)
            report = LayerReport(weight.name, shape, False, reasons, bytes_before=size, bytes_after=size)
            yield (id(inputs[weight.argument]), None, WeightView()), report


def _is_of(use: Use, slot: Slot) -> bool:
    return (use.weight.argument, use.weight.derivation, use.view) == (slot.argument, slot.derivation, slot.form.view)


def _matched_report(context: Context, slot: Slot, uses: list[Any], inputs: Sequence[Any], clock: Clock) -> LayerReport:
    weight: Tensor = inputs[slot.argument]
    packed = STORE.find(inputs, slot) or slot.pack(inputs)
    told = [each for each in (*slot.lacks(weight), _floor(context.config, slot), _floats(packed)) if each is not None]
    first = uses[0][0]
    shape = (*(() if first.batch is None else (first.batch,)), first.rows, first.columns)
    return LayerReport(
        name=slot.name,
        shape=shape,
        matched=True,
        reasons=(*context.reasons.get(slot.name, ()), *told),
        uses=tuple(use.family for use, _ in uses),
        config=slot.form.config,
        bytes_before=math.prod(shape) * weight.element_size(),
        bytes_after=packed.nbytes,
        error=packed.error,
        kernels=tuple(choice.kernel.name for _, choice in uses),
        rejected=dict(uses[0][1].rejected),
        expected=clock.times(
            [(choice.problem, use.m) for use, choice in uses], first.weight.config or slot.form.config, weight.device
        ),
    )


def _floor(config: Config, slot: Slot) -> str | None:
    """Why a weight has more bits than were asked for, or None."""
    asked = config.for_layer(slot.name)
    if asked is None or asked.bits >= slot.form.config.bits:
        return None
    return f"a table or the head, so it has end_bits={config.end_bits} in place of bits={asked.bits}"


def _floats(packed: PackedWeight) -> str | None:
    """What floats there are beside the codes, or None."""
    side = packed.side
    if side is None:
        return None
    told = [
        None if side.down is None else f"a term of rank {side.down.size(0)}",
        None if side.columns is None else f"{len(side.columns)} input columns",
        None if side.shift is None else "a corrected bias",
    ]
    return f"in float beside the codes: {', '.join(filter(None, told))} ({side.nbytes:,} bytes)"


def _packed_before(model: Any, clock: Clock) -> list[LayerReport]:
    """The modules on packed weights that :func:`kbit_inductor.quantize_` has made."""
    if not isinstance(model, nn.Module):
        return []
    names: dict[PackedMatrix, list[str]] = {}
    uses: dict[PackedMatrix, list[str]] = {}
    for name, module in model.named_modules():
        if (matrix := matrix_of(module)) is not None:
            names.setdefault(matrix, []).append(name)
            uses.setdefault(matrix, []).append("embedding" if isinstance(module, nn.Embedding) else "linear")

    def told(matrix: PackedMatrix) -> tuple[str, ...]:
        return tuple(filter(None, ("packed by quantize_", _floats(matrix.packed))))

    return [
        LayerReport(
            " = ".join(names[matrix]), tuple(matrix.shape), True, told(matrix), tuple(uses[matrix]), matrix.config,
            math.prod(matrix.shape) * matrix.dtype.itemsize, matrix.packed.nbytes, matrix.error,
            (matrix.kernel,) * len(uses[matrix]), dict(matrix.rejected),
            clock.times(
                [(dataclasses.replace(matrix.problem, family=use), None) for use in uses[matrix]], matrix.config, matrix.device
            ),
        )
        for matrix in names
    ]  # fmt: skip


def _unreached(model: Any, seen: set[int]) -> list[LayerReport]:
    """Weights of the model that no graph took as input."""
    if not isinstance(model, nn.Module):
        return []
    return [
        LayerReport(
            name.removesuffix(".weight"),
            tuple(parameter.shape),
            False,
            ("no captured graph uses it",),
            bytes_before=parameter.nbytes,
            bytes_after=parameter.nbytes,
        )
        for name, parameter in model.named_parameters()
        if parameter.dim() >= 2 and id(parameter) not in seen
    ]

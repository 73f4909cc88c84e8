"""Which pass breaks a model, in which layer, and the smallest part of the model that shows it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from kbit_inductor.config import Config
from kbit_inductor.debug.repro import Part, write
from kbit_inductor.errors import BrokenPassError
from kbit_inductor.testing.equivalence import assert_equivalent
from kbit_inductor.testing.rewriting import rewrite


@dataclass(frozen=True)
class Culprit:
    """What breaks a model.

    Attributes:
        broken_pass: the name of the first pass that breaks it, or None when passes are right and an operator or a weight is not.
        layer: the first layer, in the order of the graph, with which it breaks when all later ones stay in float; None when it
            breaks with all layers in float.
        reason: what was seen.
        script: a program that shows it, with the tensors it needs beside it; None where the graph alone, on fresh copies of its
            weights, shows nothing: a weight is packed as it was earlier.
    """

    broken_pass: str | None
    layer: str | None
    reason: str
    script: Path | None


def bisect(
    model: nn.Module,
    inputs: Tensor | Sequence[Any],
    config: Config | Mapping[str, Any] | None = None,
    folder: str | Path = "kbit-repro",
) -> Culprit | None:
    """Find the first pass and layer that break ``model``, and write a program that shows it to ``folder``.

    What is checked is that of :func:`kbit_inductor.testing.assert_equivalent`, except for what Inductor makes of the graph.

    Args:
        model: in ``eval()``.
        inputs: its arguments, or the one that it has.
        config: the options.
        folder: for ``repro.py`` and ``tensors.safetensors``; it is made, and files of these names are written over.

    Returns:
        The culprit, or None when nothing is wrong.
    """
    resolved = Config.from_options(config)
    arguments = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    fault = _fault(model, arguments, resolved)
    if fault is None:
        return None
    names = list(dict.fromkeys(slot.name for graph in _graphs(model, arguments, resolved) for slot in graph.context.slots))

    def with_first(count: int) -> Config:
        return dataclasses.replace(resolved, skip=(*resolved.skip, *names[count:]))

    count = _first(len(names), lambda count: _fault(model, arguments, with_first(count)) is not None)
    chosen = with_first(count)
    fault = _fault(model, arguments, chosen) or fault
    broken = fault.broken if isinstance(fault, BrokenPassError) else None
    layer = names[count - 1] if count else None
    reason = str(fault).split("; again: ")[0]
    who = "An operator or a weight" if broken is None else f"Pass {broken!r}"
    where = "with all layers in float" if layer is None else f"first in layer {layer!r}"
    part = _smallest(model, arguments, chosen, fault)
    script = None if part is None else write(part, Path(folder), f"{who} breaks the model, {where}.", reason)
    return Culprit(broken, layer, reason, script)


def _graphs(model: nn.Module, arguments: tuple[Any, ...], config: Config) -> list[Any]:
    """Every graph of the model, whether its passes are right or not."""
    return rewrite(model, *arguments, config=dataclasses.replace(config, debug=False))


def _fault(model: nn.Module, arguments: tuple[Any, ...], config: Config) -> AssertionError | None:
    """What is wrong with ``model``, or None."""
    try:
        assert_equivalent(model, arguments, config, through_inductor=False)
    except LookupError:  # it packs nothing, and its passes were right
        return None
    except AssertionError as error:
        return error
    return None


def _first(count: int, breaks: Callable[[int], bool]) -> int:
    """The least number for which ``breaks``, by halving; it does for ``count``."""
    low, high = 0, count
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if breaks(middle) else (middle + 1, high)
    return high


def _smallest(model: nn.Module, arguments: tuple[Any, ...], config: Config, fault: AssertionError) -> Part | None:
    """The shortest run of operators of the model's graph that is found by taking away from its front and back, broken as before."""

    def breaks(part: Part) -> bool:
        found = _fault(part.module, part.inputs, part.config)
        return found is not None and _same(found, fault)

    parts = [Part.of(graph, config) for graph in _graphs(model, arguments, config)]
    part = next((each for each in parts if breaks(each)), None)
    step = len(part.nodes) // 2 if part is not None else 0
    while step:
        for shorter in (part.without(step, 0), part.without(0, step)):  # type: ignore[union-attr]  # there are steps of a part
            if shorter.nodes and breaks(shorter):
                part = shorter
                break
        else:
            step //= 2
    return part


def _same(a: AssertionError, b: AssertionError) -> bool:
    return getattr(a, "broken", None) == getattr(b, "broken", None)

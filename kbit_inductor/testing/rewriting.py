"""A model rewritten as the backend rewrites it, and not compiled: what tests of passes look at."""

from __future__ import annotations

import types
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from kbit_inductor import backend
from kbit_inductor.capture import Context
from kbit_inductor.config import Config
from kbit_inductor.debug.inspector import operators_of
from kbit_inductor.errors import KbitError
from kbit_inductor.passes.pipeline import Observer
from kbit_inductor.passes.record import Pass


@dataclass(frozen=True)
class Rewritten:
    """One graph of a model.

    Attributes:
        captured: as Dynamo gave it.
        graph: as the passes left it.
        context: what they found.
        inputs: what the captured graph was called with.
    """

    captured: fx.GraphModule
    graph: fx.GraphModule
    context: Context
    inputs: tuple[Any, ...]

    @property
    def operators(self) -> Counter[str]:
        """How often each operator is called."""
        return operators_of(self.graph)

    @property
    def fusions(self) -> Counter[str]:
        """How often each kind of fusion was done."""
        return self.context.fusions


def rewrite(
    model: Any,
    *inputs: Any,
    config: Config | Mapping[str, Any] | None = None,
    passes: Sequence[Pass] | None = None,
    observers: Sequence[Observer] = (),
    dynamic: bool | None = False,
) -> list[Rewritten]:
    """Every graph of ``model``, called with ``inputs`` once in eager, without gradients.

    Args:
        model: a module or function.
        inputs: its arguments.
        config: the options.
        passes: in order; None for all that are registered.
        observers: what looks on as each pass is run.
        dynamic: as in ``torch.compile``.

    Raises:
        KbitError: as the compiled model would.
    """
    resolved = Config.from_options(config)
    graphs: list[Rewritten] = []
    errors: list[KbitError] = []

    def keep(gm: fx.GraphModule, given: Sequence[Any]) -> Any:
        try:
            rewritten, context = backend.capture(gm, given, resolved, passes, observers)
            graphs.append(Rewritten(gm, rewritten, context, tuple(given)))
        except KbitError as error:  # raised below: Dynamo would wrap it
            errors.append(error)
        return gm.forward

    with torch.no_grad():
        torch.compile(fresh_call(model), backend=keep, dynamic=dynamic)(*inputs)
    if errors:
        raise errors[0]
    return graphs


def fresh_call(model: Callable[..., Any]) -> Callable[..., Any]:
    """``model`` behind a code object of its own: Dynamo keeps what it captured by code object, so another one captures anew."""

    def call(*arguments: Any) -> Any:
        return model(*arguments)

    return types.FunctionType(call.__code__.replace(), call.__globals__, call.__name__, None, call.__closure__)

"""The passes that are built in, as they follow one another, and how passes are run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

from torch import fx

from kbit_inductor.capture import Context
from kbit_inductor.errors import InvalidPassError
from kbit_inductor.passes.adapters import widen_adapters
from kbit_inductor.passes.between import clear_between
from kbit_inductor.passes.chain import chain
from kbit_inductor.passes.cleanup import drop_unused_weights
from kbit_inductor.passes.derive import derive_weights, explain_computed_weights
from kbit_inductor.passes.epilogue import fuse_epilogues
from kbit_inductor.passes.expand import expand_weight_calls
from kbit_inductor.passes.fold import fold
from kbit_inductor.passes.fuse import fuse
from kbit_inductor.passes.lower import lower_marks
from kbit_inductor.passes.products import match_products
from kbit_inductor.passes.record import Pass
from kbit_inductor.passes.select import select_early
from kbit_inductor.passes.values import infer_values
from kbit_inductor.passes.written_out import write_out


def _fold(gm: fx.GraphModule, context: Context) -> None:
    write_out(gm, context)
    widen_adapters(context)
    fold(gm, context)


def _expand(gm: fx.GraphModule, context: Context) -> None:
    expand_weight_calls(context)
    if derive_weights(context):
        expand_weight_calls(context)
    explain_computed_weights(context)


def _pack(gm: fx.GraphModule, context: Context) -> None:
    match_products(context)
    lower_marks(context)


def _fuse(gm: fx.GraphModule, context: Context) -> None:
    clear_between(context)
    fuse(context)
    fuse_epilogues(context)


def _chain(gm: fx.GraphModule, context: Context) -> None:
    chain(context)


def _cleanup(gm: fx.GraphModule, context: Context) -> None:
    drop_unused_weights(context)


BUILT_IN = (
    Pass("select", select_early, "bounded"),
    Pass("fold", _fold, "bounded", after=("select",)),
    Pass("expand", _expand, "bounded", after=("fold",)),
    Pass("pack", _pack, "quantizing", after=("expand",)),
    Pass("fuse", _fuse, "bounded", after=("pack",)),
    Pass("chain", _chain, "bounded", after=("fuse",)),
    Pass("cleanup", _cleanup, "bitwise", after=("chain",)),
)
"""From Dynamo's graph to one that takes packed weights. None of them reads a weight's value."""


class Observer(Protocol):
    """Looks at a graph before the first pass and after each."""

    def before(self, gm: fx.GraphModule, context: Context) -> None:
        """The graph as it was captured."""

    def after(self, each: Pass, gm: fx.GraphModule, context: Context, seconds: float) -> None:
        """What the pass ``each`` made of it, and how long that took."""


def run(gm: fx.GraphModule, context: Context, passes: Sequence[Pass], observers: Sequence[Observer] = ()) -> None:
    """Let each of ``passes`` rewrite ``gm``, whose graph is that of ``context``.

    Nodes that a pass of others leaves without a fake value are given one, so that the passes after it know them.

    Raises:
        InvalidPassError: a pass returned another graph in place of editing this one.
    """
    for observer in observers:
        observer.before(gm, context)
    for each in passes:
        start = time.perf_counter()
        returned = each.run(gm, context)
        if (returned is not None and returned is not gm) or gm.graph is not context.graph:
            raise InvalidPassError(f"pass {each.name!r} returned another graph; edit gm.graph in place and return gm or nothing")
        if each not in BUILT_IN:
            infer_values(gm, context)
        for observer in observers:
            observer.after(each, gm, context, time.perf_counter() - start)

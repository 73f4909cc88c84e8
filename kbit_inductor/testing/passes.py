"""Whether a pass keeps its promise, on models that show what passes get wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx, nn

from kbit_inductor.capture import Context
from kbit_inductor.config import Config
from kbit_inductor.passes.order import ordered
from kbit_inductor.passes.pipeline import BUILT_IN
from kbit_inductor.passes.record import Pass
from kbit_inductor.testing.models import examples
from kbit_inductor.testing.rewriting import rewrite

CHECKED = {"bits": 4, "group_size": 16, "min_elements": 0, "activation_bits": 16}


def check_pass(
    checked: Pass,
    models: Sequence[tuple[nn.Module, tuple[Any, ...]]] | None = None,
    config: Config | Mapping[str, Any] | None = None,
    *,
    dynamic: bool | None = False,
) -> int:
    """Run ``checked`` among the built-in passes on ``models`` and check after each pass what ``debug`` checks.

    Args:
        checked: what :func:`kbit_inductor.register_pass` returned, or :func:`kbit_inductor.passes.registry.make_pass`.
        models: with their inputs; None for :func:`kbit_inductor.testing.models.examples`.
        config: the options; None for 4 bits in groups of 16, activations in float.
        dynamic: as in ``torch.compile``; True for sizes that are symbols.

    Returns:
        How many graphs it changed.

    Raises:
        BrokenPassError: the graph is not sound after a pass, a shape is wrong, or the tier's promise is not kept.
        PassOrderError: it cannot stand where it says.
        AssertionError: it changed no graph, so nothing was checked.
    """
    order = ordered((*(each for each in BUILT_IN if each.name != checked.name), checked))
    options = dataclasses.replace(Config.from_options(CHECKED if config is None else config), debug=True)
    changes = Changes(checked)
    for model, inputs in examples() if models is None else models:
        rewrite(model.eval(), *inputs, config=options, passes=order, observers=[changes], dynamic=dynamic)
    if not changes.count:
        raise AssertionError(f"pass {checked.name!r} changed none of the graphs; give models that it applies to")
    return changes.count


class Changes:
    """Counts the graphs that one pass changes. An observer of :func:`kbit_inductor.testing.rewrite`."""

    def __init__(self, checked: Pass) -> None:
        self.checked = checked
        self.count = 0

    def before(self, gm: fx.GraphModule, context: Context) -> None:
        """Remember the graph."""
        self.text = str(gm.graph)

    def after(self, each: Pass, gm: fx.GraphModule, context: Context, seconds: float) -> None:
        """Compare it with what is remembered."""
        before, self.text = self.text, str(gm.graph)
        self.count += each is self.checked and before != self.text

"""``bits="auto"`` where there is a graph and no data: the backend's own choice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from kbit_inductor._compat import no_modes
from kbit_inductor.bits.planner import solve
from kbit_inductor.bits.units import Unit
from kbit_inductor.capture import GraphWeight
from kbit_inductor.config import Config
from kbit_inductor.ends import is_table
from kbit_inductor.kernels.layout import MAX_BITS
from kbit_inductor.logs import logger
from kbit_inductor.weights.release import is_released
from kbit_inductor.weights.store import STORE

log = logger("capture")


def with_bits(config: Config, weights: Sequence[GraphWeight], inputs: Sequence[Any]) -> Config:
    """``config`` with the bits chosen for the ``weights`` of one graph, by their values among ``inputs``.

    A weight that was released keeps the bits that it is packed with. Each graph of a model is given the budget for itself.

    Raises:
        BudgetError: even the least bits do not fit.
    """
    units: dict[Any, Unit] = {}
    kept: dict[str, dict[str, int]] = {}
    last = next((w for w in reversed(weights) if w.config is not None and not is_table(w.node)), None)
    with torch.no_grad(), no_modes():
        for weight in weights:
            value = inputs[weight.argument]
            if weight.config is None or value.dim() != 2:
                continue
            if is_released(value):
                kept[weight.name] = {"bits": max((packed.config.bits for _, packed in STORE.packed_forms(value)), default=MAX_BITS)}
                continue
            pinned = config.pinned_bits(weight.name)
            unit = units.setdefault((_shared_input(weight) or weight.node, pinned, weight.config), Unit({}, weight.config, pinned))
            unit.weights[value] = [weight.name]
            unit.is_end |= is_table(weight.node) or weight is last
            if all(user.target is torch.nn.functional.embedding for user in weight.node.users):
                unit.looked_up.add(value)
        rest = sum(inputs[w.argument].nbytes for w in weights if w.config is None or inputs[w.argument].dim() != 2)
        plan = solve(list(units.values()), config, rest)
    log.info("%s", plan)
    return config.planned({**kept, **plan.overrides})


def _shared_input(weight: GraphWeight) -> fx.Node | None:
    """What the weight is multiplied with, where that is plain to see."""
    users = list(weight.node.users)
    first = users[0].args[0] if len(users) == 1 and users[0].args else None
    return first if isinstance(first, fx.Node) and first is not weight.node else None

"""The order of passes, from what each says of its neighbours."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from graphlib import CycleError, TopologicalSorter

from kbit_inductor.errors import PassOrderError
from kbit_inductor.passes.record import Pass


def ordered(passes: Sequence[Pass]) -> tuple[Pass, ...]:
    """``passes`` in an order that obeys every ``before`` and ``after``: each as early as it may, by name among equals.

    Raises:
        PassOrderError: a constraint that names no pass, or constraints that form a circle.
    """
    by_name = {each.name: each for each in passes}
    earlier: dict[str, set[str]] = {name: set() for name in by_name}
    for each in passes:
        for neighbour in (*each.before, *each.after):
            if neighbour not in by_name:
                raise PassOrderError(_unknown(each.name, neighbour, by_name))
        earlier[each.name].update(each.after)
        for later in each.before:
            earlier[later].add(each.name)
    sorter = TopologicalSorter(earlier)
    try:
        sorter.prepare()
    except CycleError as error:
        circle = " before ".join(error.args[1])  # it names each before the one that needs it
        raise PassOrderError(f"passes form a circle: {circle}; take away one 'before' or 'after' of these") from None
    order: list[Pass] = []
    ready = sorted(sorter.get_ready())
    while ready:
        name = ready.pop(0)
        order.append(by_name[name])
        sorter.done(name)
        ready = sorted([*ready, *sorter.get_ready()])
    return tuple(order)


def _unknown(name: str, neighbour: str, known: dict[str, Pass]) -> str:
    close = difflib.get_close_matches(neighbour, known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"pass {name!r} is to run before or after {neighbour!r}, which is no pass.{hint} Known: {', '.join(known)}"

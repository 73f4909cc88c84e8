"""Passes by name: those that are built in and those that :func:`register_pass` adds.

A name stands for one pass for as long as the process lives, and the order of passes follows from what they say of each other, so
nothing depends on the order of imports.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import overload

from kbit_inductor.entry_points import load
from kbit_inductor.errors import InvalidPassError
from kbit_inductor.passes.order import ordered
from kbit_inductor.passes.pipeline import BUILT_IN
from kbit_inductor.passes.record import TIERS, Pass, Run

GROUP = "kbit_inductor.passes"
_by_name = {each.name: each for each in BUILT_IN}
_lock = threading.Lock()


@overload
def register_pass(
    run: None = None, *, tier: str, before: str | Sequence[str] = (), after: str | Sequence[str] = (), name: str | None = None
) -> Callable[[Run], Pass]: ...
@overload
def register_pass(
    run: Run, *, tier: str, before: str | Sequence[str] = (), after: str | Sequence[str] = (), name: str | None = None
) -> Pass: ...
def register_pass(
    run: Run | None = None,
    *,
    tier: str,
    before: str | Sequence[str] = (),
    after: str | Sequence[str] = (),
    name: str | None = None,
) -> Pass | Callable[[Run], Pass]:
    """Let ``run`` rewrite every graph that is compiled from now on. Called as a function or as a decorator.

    Another package does the same by an entry point of the group ``kbit_inductor.passes`` that names a :class:`Pass`.

    Args:
        run: ``(gm, context)``, which edits ``gm.graph`` in place.
        tier: what it promises: ``"bitwise"``, ``"bounded"`` or ``"quantizing"`` (:data:`kbit_inductor.passes.record.TIERS`).
        before: name or names of passes that must run later. The built-in ones are ``select``, ``fold``, ``expand``, ``pack``,
            ``fuse``, ``chain``, ``cleanup``.
        after: name or names of passes that must have run.
        name: by which others refer to it; the function's own where it is None.

    Raises:
        InvalidPassError: there is no such tier, or another pass has the name (the same one may come again).
    """

    def register(function: Run) -> Pass:
        return add(make_pass(function, tier=tier, before=before, after=after, name=name))

    return register if run is None else register(run)


def make_pass(
    run: Run, *, tier: str, before: str | Sequence[str] = (), after: str | Sequence[str] = (), name: str | None = None
) -> Pass:
    """The record that :func:`register_pass` would register, for one that is only to be checked.

    Raises:
        InvalidPassError: there is no such tier.
    """
    chosen = name or str(getattr(run, "__name__", type(run).__name__))
    if tier not in TIERS:
        raise InvalidPassError(f"pass {chosen!r} has the tier {tier!r}; give one of {', '.join(TIERS)}")
    earlier, later = ((names,) if isinstance(names, str) else tuple(names) for names in (before, after))
    return Pass(chosen, run, tier, earlier, later)


def add(new: Pass) -> Pass:
    """Register a record.

    Raises:
        InvalidPassError: another pass has the name.
    """
    with _lock:
        if _by_name.setdefault(new.name, new) != new:
            raise InvalidPassError(f"there is another pass of the name {new.name!r}; give this one another name")
    return new


def passes() -> tuple[Pass, ...]:
    """All passes of this process, those of entry points among them, as they are run.

    Raises:
        InvalidPassError: an entry point that names no pass, or another one of a name that is taken.
        PassOrderError: a constraint that names no pass, or a circle.
    """
    for origin, found in load(GROUP):
        if not isinstance(found, Pass):
            raise InvalidPassError(f"{origin} names a {type(found).__name__}; let it name what register_pass returned")
        add(found)
    return ordered(tuple(_by_name.values()))

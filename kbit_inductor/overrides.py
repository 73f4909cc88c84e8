"""Find entries of ``overrides`` and ``skip`` that name no layer."""

from __future__ import annotations

import difflib
import gc
from collections.abc import Sequence
from typing import Any

from torch import nn

from kbit_inductor.capture import GraphWeight
from kbit_inductor.config import Config, matches
from kbit_inductor.errors import UnmatchedOverrideError
from kbit_inductor.logs import logger
from kbit_inductor.models.modules import matrix_of

log = logger("capture")


def check_overrides(config: Config, weights: Sequence[GraphWeight], inputs: Sequence[Any]) -> None:
    """Raise when an entry names a layer neither of this graph nor of a module that owns this graph's weights.

    A model with graph breaks, or compiled block by block, reaches the backend one graph at a time, so an entry without a match here
    may have one in the next graph; then a warning is logged.

    Raises:
        UnmatchedOverrideError: an entry that cannot match in any graph of the model.
    """
    here = [weight.name for weight in weights]
    unmatched = [p for p in (*config.overrides, *config.skip) if not any(matches(p, name) for name in here)]
    if not unmatched or not weights:
        return
    everywhere = _layer_names({id(inputs[weight.argument]) for weight in weights})
    for pattern in unmatched:
        _check(pattern, [*here, *everywhere])
        log.warning("the entry %r of 'overrides' or 'skip' matches no layer of the graph being compiled", pattern)


def check_names(config: Config, layers: Sequence[str], model: nn.Module) -> None:
    """Raise when an entry names none of ``layers``, nor a layer with another parameter of ``model``.

    Raises:
        UnmatchedOverrideError: such an entry.
    """
    others = [name.removesuffix(".weight") for name, _ in model.named_parameters(remove_duplicate=False)]
    for pattern in (*config.overrides, *config.skip):
        _check(pattern, [*layers, *others])


def _check(pattern: str, names: Sequence[str]) -> None:
    if not any(matches(pattern, name) for name in names):
        known = list(dict.fromkeys(names))
        close = difflib.get_close_matches(pattern, sorted(known), n=3, cutoff=0.4) or known[:3]
        raise UnmatchedOverrideError(
            f"the entry {pattern!r} of 'overrides' or 'skip' matches no layer; layers with such names: {', '.join(close)}"
        )


def _layer_names(weight_ids: set[int]) -> set[str]:
    """Names of all layers in every module tree on the heap that holds one of the weights."""
    names: set[str] = set()
    for candidate in gc.get_objects():
        if issubclass(type(candidate), nn.Module):
            parameters = [
                *candidate.named_parameters(remove_duplicate=False),
                *candidate.named_buffers(remove_duplicate=False),
            ]
            if any(id(tensor) in weight_ids for _, tensor in parameters):
                names |= {name.removesuffix(".weight") for name, _ in parameters}
                names |= {name for name, module in candidate.named_modules() if matrix_of(module) is not None}
    return names

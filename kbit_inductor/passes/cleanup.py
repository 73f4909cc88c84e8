"""Remove what the rewrite left without use: views of packed weights, and the inputs of weights that no node reads any more."""

from __future__ import annotations

import dataclasses

from torch import fx

from kbit_inductor._compat import no_modes
from kbit_inductor.capture import Context, GraphWeight
from kbit_inductor.passes.derive import COMPUTED, ancestors
from kbit_inductor.weights.views import Strides, covers


def drop_unused_weights(context: Context) -> None:
    """Erase dead views of weights and what computed them, then the placeholders of weights without users.

    Nothing else is erased: a node without users may still write to a tensor, and general dead-code elimination would remove it.
    """
    replaced = _drop_derived(context)
    for node in reversed(list(context.graph.nodes)):
        is_dead = node.op in ("call_function", "call_method") and not node.users
        if is_dead and (node in replaced or context.is_view(node)):
            context.graph.erase_node(node)
    _explain_sources(context)
    packed = {slot.argument for slot in context.slots}
    read = set()
    for weight in context.weights:
        if weight.argument not in packed or weight.derivation is not None:
            continue
        if weight.node.users:
            read.add(weight.argument)
            context.explain(weight, "other nodes of the graph still read its floats")
        else:
            context.graph.erase_node(weight.node)
    if context.config.release_weights:
        read |= {weight.argument for weight in context.weights if weight.argument in packed and not _is_covered(context, weight)}
        context.slots[:] = [dataclasses.replace(slot, may_release=slot.argument not in read) for slot in context.slots]


def _drop_derived(context: Context) -> set[fx.Node]:
    """Take away the inputs that stood for computed weights, and give the nodes that compute those."""
    replaced: set[fx.Node] = set()
    for weight in context.weights:
        if weight.computed is not None:
            if weight.node.users:
                weight.node.replace_all_uses_with(weight.computed)
                context.explain(weight, COMPUTED)
            context.graph.erase_node(weight.node)
            replaced |= ancestors(weight.computed)
    return replaced


def _explain_sources(context: Context) -> None:
    """Parameters of which nothing is left in the graph but the packed weight that is computed from them."""
    derived = {slot.derivation: slot for slot in context.slots if slot.derivation is not None}
    for weight in context.weights:
        for derivation, slot in derived.items():
            if weight.derivation is None and weight.argument in derivation.sources and not weight.node.users:
                context.reasons.pop(weight.name, None)
                if weight.argument != slot.argument:
                    context.explain(weight, f"packed as part of {slot.name}")


def _is_covered(context: Context, weight: GraphWeight) -> bool:
    """Whether the packed matrices hold all of ``weight``, so that it can be restored from them."""
    views = {slot.form.view for slot in context.slots if slot.argument == weight.argument and slot.derivation is None}
    with no_modes():
        return covers(views, dataclasses.replace(Strides.of(weight.value), offset=0))

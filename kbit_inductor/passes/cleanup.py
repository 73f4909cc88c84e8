"""Remove what the rewrite left without use: views of packed weights, and the inputs of weights that no node reads any more."""

from __future__ import annotations

import dataclasses

from kbit_inductor._compat import no_modes
from kbit_inductor.capture import Context, GraphWeight
from kbit_inductor.views import Strides, covers


def drop_unused_weights(context: Context) -> None:
    """Erase dead views of weights, then the placeholders of weights without users.

    Only views and copies of unmodified weights are erased: a node without users may still write to a tensor, and general
    dead-code elimination would remove it.
    """
    for node in reversed(list(context.graph.nodes)):
        if node.op in ("call_function", "call_method") and not node.users and context.is_view(node):
            context.graph.erase_node(node)
    packed = {slot.argument for slot in context.slots}
    read = set()
    for weight in context.weights:
        if weight.argument not in packed:
            continue
        if weight.node.users:
            read.add(weight.argument)
            context.explain(weight, "other nodes of the graph still read its floats")
        else:
            context.graph.erase_node(weight.node)
    if context.config.release_weights:
        read |= {weight.argument for weight in context.weights if weight.argument in packed and not _is_covered(context, weight)}
        context.slots[:] = [dataclasses.replace(slot, may_release=slot.argument not in read) for slot in context.slots]


def _is_covered(context: Context, weight: GraphWeight) -> bool:
    """Whether the packed matrices hold all of ``weight``, so that it can be restored from them."""
    views = {slot.form.view for slot in context.slots if slot.argument == weight.argument}
    with no_modes():
        return covers(views, dataclasses.replace(Strides.of(weight.value), offset=0))

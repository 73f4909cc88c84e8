"""The passes, in the order in which they run."""

from __future__ import annotations

from kbit_inductor.capture import Context
from kbit_inductor.passes.chain import chain
from kbit_inductor.passes.cleanup import drop_unused_weights
from kbit_inductor.passes.expand import expand_weight_calls
from kbit_inductor.passes.fuse import fuse
from kbit_inductor.passes.lower import Lowered, lower_marks
from kbit_inductor.passes.products import explain_computed_weights, match_products


def run(context: Context) -> Lowered:
    """Rewrite the graph of ``context`` to take packed weights. No step reads a weight's value."""
    expand_weight_calls(context)
    explain_computed_weights(context)
    match_products(context)
    lowered = lower_marks(context)
    lowered.fusions = fuse(context, lowered)
    chain(context, lowered)
    drop_unused_weights(context, lowered)
    return lowered

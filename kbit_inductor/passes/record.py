"""What a pass is: a plain function on a graph, with what it promises about numbers and where it stands among the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import fx

from kbit_inductor.capture import Context

TIERS = ("bitwise", "bounded", "quantizing")
"""What becomes of the numbers that a graph computes.

``"bitwise"``: every bit stays. ``"bounded"``: the exact result stays, its rounding may differ. ``"quantizing"``: the exact result
is that of the graph before with the weights that the packed ones stand for.
"""

Run = Callable[[fx.GraphModule, Context], "fx.GraphModule | None"]
"""``(gm, context) -> gm``: rewrites ``gm.graph`` in place and returns ``gm`` or nothing."""


@dataclass(frozen=True)
class Pass:
    """A rewrite of the captured graph.

    Attributes:
        name: by which others say where they stand.
        run: ``(gm, context)``, which edits ``gm.graph`` in place.
        tier: one of :data:`TIERS`.
        before: names of passes that must run later.
        after: names of passes that must have run.
    """

    name: str
    run: Run
    tier: str
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()

    def __call__(self, gm: fx.GraphModule, context: Context) -> fx.GraphModule | None:
        """Rewrite ``gm`` as :attr:`run` does."""
        return self.run(gm, context)

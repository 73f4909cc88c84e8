"""A module as the passes leave it, and how far its result then is from the module with dequantized weights."""

from __future__ import annotations

from torch import Tensor, nn

from kbit_inductor import backend
from kbit_inductor.debug import exact
from kbit_inductor.passes.pipeline import BUILT_IN
from kbit_inductor.testing import dequantized_copy, relative_error, rewrite

OPTIONS = {"bits": 5, "group_size": 16, "min_elements": 0}
ACTIVATIONS = {name: function for name, function in exact.ACTIVATIONS.items() if name}


class Compiled:
    """``module`` rewritten and run, with the fusions that were done and the operators in the graph.

    Without ``chains``, products that follow one another stay calls of their own, so that they can be counted.
    """

    def __init__(self, module: nn.Module, *inputs: Tensor, chains: bool = False, **options: object) -> None:
        module.eval().requires_grad_(False)
        passes = [each for each in BUILT_IN if chains or each.name != "chain"]
        (graph,) = rewrite(module, *inputs, config=OPTIONS | options, passes=passes)
        self.fusions, self.operators = graph.fusions, graph.operators
        kept = backend.kept_arguments(graph.context, len(graph.inputs))
        (self.result,) = backend.Bound(graph.graph.forward, kept, tuple(graph.context.slots))(*graph.inputs)
        self.error = relative_error(self.result, dequantized_copy(module)(*inputs))

    def products(self) -> int:
        return self.operators["kbit.fused_linear_cpu.default"] + self.operators["kbit.linear_cpu.default"]

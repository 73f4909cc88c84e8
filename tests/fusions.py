"""What becomes of a module on the way to Inductor, for tests of fusions."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from kbit_inductor import backend
from kbit_inductor.capture import Context
from kbit_inductor.passes import pipeline
from kbit_inductor.testing import dequantized_copy, relative_error

OPTIONS = {"bits": 5, "group_size": 16, "min_elements": 0}


class Compiled:
    """``module`` compiled up to Inductor, with the fusions that were done and the operators in the graph.

    Without ``chains``, products that follow one another stay calls of their own, so that they can be counted.
    """

    def __init__(self, module: nn.Module, *inputs: Tensor, chains: bool = False, **options: object) -> None:
        module.eval().requires_grad_(False)
        self.fusions: Counter[str] = Counter()
        self.operators: Counter[str] = Counter()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(backend, "inductor", self._keep)
            if not chains:
                patch.setattr(pipeline, "chain", lambda context: None)
            run = pipeline.run
            patch.setattr(pipeline, "run", lambda gm, context, *rest: self._count(context, run(gm, context, *rest)))
            self.result = torch.compile(module, backend="kbit", options=OPTIONS | options)(*inputs)
        self.error = relative_error(self.result, dequantized_copy(module)(*inputs))

    def _count(self, context: Context, _: None) -> None:
        self.fusions += context.fusions

    def _keep(self, gm, inputs, mode):
        self.operators += Counter(str(node.target) for node in gm.graph.nodes if node.op in ("call_function", "call_method"))
        return gm.forward

    def products(self) -> int:
        return self.operators["kbit.fused_linear_cpu.default"] + self.operators["kbit.linear_cpu.default"]

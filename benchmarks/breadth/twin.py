"""The model in eager with the weights that the packed ones stand for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from kbit_inductor import backend
from kbit_inductor.capture import Context
from kbit_inductor.config import Config
from kbit_inductor.debug.trial import snapshot
from kbit_inductor.passes.record import Pass
from kbit_inductor.testing import dequantized_copy
from kbit_inductor.weights.store import STORE


def twin(model: nn.Module, config: Config, computed: bool, run: Callable[..., Any]) -> Callable[..., Any]:
    """``model`` with dequantized weights, to be called with its keywords.

    Where weights are ``computed`` from parameters there is no parameter to write the dequantized weight to. Then the graphs that
    Dynamo captures take it, before anything in them is packed; ``run(backend, keywords)`` captures them.
    """
    if not computed:
        return dequantized_copy(model)
    return lambda **keywords: run(lambda gm, inputs: _Unpacked(gm, inputs, config), keywords)


class _Unpacked:
    """A captured graph as it is before the pass ``pack``, called on dequantized weights."""

    def __init__(self, gm: fx.GraphModule, inputs: Sequence[Any], config: Config) -> None:
        _, self.context = backend.capture(gm, inputs, config, observers=[self])

    def before(self, gm: fx.GraphModule, context: Context) -> None:
        pass

    def after(self, each: Pass, gm: fx.GraphModule, context: Context, seconds: float) -> None:
        if each.name == "expand":
            self.graph = snapshot(gm)

    def __call__(self, *arguments: Any) -> Any:
        slots = self.context.slots
        values = list(arguments)
        places: dict[Any, int] = {}
        for weight in self.context.weights:
            if weight.derivation is not None:
                places[weight.derivation] = len(values)
                values.append(weight.derivation.compute(arguments))
        fresh: dict[int, Tensor] = {}
        for slot, packed in zip(slots, STORE.packed(arguments, slots), strict=True):
            place = slot.argument if slot.derivation is None else places[slot.derivation]
            fresh.setdefault(place, values[place].detach().clone())
            slot.form.view.assign(fresh[place], packed.dequantize())
        with torch.no_grad():
            return self.graph.forward(*(fresh.get(place, value) for place, value in enumerate(values)))

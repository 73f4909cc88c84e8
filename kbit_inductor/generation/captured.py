"""A function of a module's weights, compiled once as one graph and then called past Dynamo.

A compiled function first makes sure, at each call, that all it was captured from is as it was. For a language model these are some
thousand guards on modules, attributes and parameters for every token. Where one owner decides on the shapes, and the weights are
all that may change, looking at the weights once per text is enough, packed ones too, and a call is the graph's alone.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from kbit_inductor._compat import below_autograd, no_size_asserts
from kbit_inductor.backend import Bound, kbit
from kbit_inductor.config import Config


class Captured:
    """``function`` as a graph of its arguments and of the weights of ``module``, compiled when this is made.

    Args:
        function: of tensors to one tensor.
        module: whose parameters and buffers ``function`` reads.
        examples: arguments of ``function``. One of them has a size marked by ``torch._dynamo.mark_dynamic``, the only one that may
            change from call to call.
        config: the options of the backend.
    """

    def __init__(self, function: Callable[..., Tensor], module: nn.Module, examples: Sequence[Tensor], config: Config) -> None:
        self._module = module
        self._config = config
        # Of a code object of its own, since Dynamo counts and keeps what it compiles by code object.
        code = function.__code__.replace()
        function = types.FunctionType(code, function.__globals__, code.co_name, None, function.__closure__)
        # Guards would never be looked at.
        options: dict[str, str | int | bool | Callable[..., Any]] = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
        with torch.no_grad(), no_size_asserts():
            torch.compile(function, backend=self._backend, fullgraph=True, options=options)(*examples)
        kept = [self._arguments[i] for i in self._compiled.kept]
        self._places = [[i for i, value in enumerate(kept) if value is example] for example in examples]
        self._size_places = [i for i, value in enumerate(kept) if isinstance(value, int)]
        self._weights = self._find_weights()
        self._layouts = {place: _layout(self._arguments[place]) for place in self._weights}

    def _backend(self, graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        compiled = kbit(graph, inputs, options=self._config)
        if not isinstance(compiled, Bound):
            return compiled  # raises what is wrong
        self._compiled = compiled
        return self._first_call

    def _first_call(self, *arguments: Any) -> Any:
        self._arguments = list(arguments)
        return self._compiled(*arguments)

    def _find_weights(self) -> dict[int, list[str]]:
        """The names in the module, more than one where weights are tied, of each argument that is a weight."""
        names: dict[int, list[str]] = {}
        for name, tensor in _tensors(self._module).items():
            names.setdefault(id(tensor), []).append(name)
        return {i: names[id(value)] for i, value in enumerate(self._arguments) if id(value) in names}

    def rebind(self) -> bool:
        """Take the tensors that the module has now for its weights. False where the graph was compiled for other ones.

        Raises:
            ReleasedWeightError: the graph reads a float weight that was freed.
        """
        self._operands: list[Any] = []  # packed weights of before may go
        tensors = _tensors(self._module)
        for place, names in self._weights.items():
            weight = tensors.get(names[0])
            if weight is None or any(tensors.get(name) is not weight for name in names) or _layout(weight) != self._layouts[place]:
                return False
            self._arguments[place] = weight
        self._operands = self._compiled.operands(self._arguments)
        return True

    def __call__(self, size: int, *arguments: Tensor) -> Tensor:
        """Call the graph with ``size`` for the marked one, after :meth:`rebind`; ``arguments`` stand for the first examples."""
        called = self._operands.copy()
        for place in self._size_places:
            called[place] = size
        for places, argument in zip(self._places, arguments, strict=False):
            for place in places:
                called[place] = argument
        with torch.no_grad(), below_autograd():
            (result,) = self._compiled.inner(*called)
        return result  # type: ignore[no-any-return]


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return dict([*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)])


def _layout(weight: Tensor) -> tuple[object, ...]:
    """What a graph is compiled for."""
    return type(weight), weight.shape, weight.stride(), weight.dtype, weight.device

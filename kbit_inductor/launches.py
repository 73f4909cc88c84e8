"""The products that a GPU would launch for a model, found on a machine that need not have one: what ``kbit tune`` measures.

Where the backend has packed a model's weights, for whatever device they are on, each product is written as that of a GPU and the
GPU's pass (:mod:`kbit_inductor.passes.epilogue`) fuses them: queries, keys and values, or a gate and its factor, are one launch
then, of as many rows as they have together.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from kbit_inductor import backend
from kbit_inductor._compat import uncompiled
from kbit_inductor.capture import VALUE, Context
from kbit_inductor.config import Config, LayerConfig
from kbit_inductor.errors import KbitError
from kbit_inductor.lowering.problem import Problem
from kbit_inductor.models.modules import matrix_of
from kbit_inductor.passes.epilogue import FUSED, LINEAR, fuse_epilogues
from kbit_inductor.passes.record import Pass
from kbit_inductor.reports.explain import as_it_is, call_once

PACKING = "pack"  # the pass that turns products into operators
PRODUCTS = {torch.ops.kbit.tiled_linear_cpu.default, torch.ops.kbit.linear.default, LINEAR}  # that packed modules call


def launches(
    model: nn.Module, inputs: Sequence[Any], config: Config | Mapping[str, Any] | None, dtype: torch.dtype
) -> list[Problem]:
    """The products of a model in ``dtype`` on packed weights, each shape once; ``rows`` are those of all matrices of a launch.

    Raises:
        ModelCallError, KbitError: as :func:`kbit_inductor.explain`.
    """
    recorder = _Recorder(Config.from_options(config), model, dtype)
    call_once(uncompiled(model), recorder, *inputs)
    return list(dict.fromkeys(recorder.found))


class _Recorder:
    """A backend that notes the launches of each graph and then runs it as it is."""

    def __init__(self, config: Config, model: nn.Module, dtype: torch.dtype) -> None:
        self.config = config
        self.dtype = dtype
        self.found: list[Problem] = []
        matrices = [matrix for module in model.modules() if (matrix := matrix_of(module)) is not None]
        self.matrices = {id(operand): matrix for matrix in matrices for operand in matrix.packed.operands}

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        try:
            _, context = backend.capture(gm, inputs, self.config, observers=[_Products(self, inputs)])
        except KbitError as error:
            return backend.raiser(error)
        return as_it_is(gm, inputs, context)


class _Products:
    """Looks at one graph when its weights have been packed."""

    def __init__(self, recorder: _Recorder, inputs: Sequence[Any]) -> None:
        self.recorder = recorder
        self.inputs = inputs

    def before(self, gm: fx.GraphModule, context: Context) -> None:
        """Nothing is packed yet."""

    def after(self, each: Pass, gm: fx.GraphModule, context: Context, seconds: float) -> None:
        """Note what a GPU would launch."""
        if each.name == PACKING:
            self.recorder.found += _fused(context, self._problems(context))

    def _problems(self, context: Context) -> dict[fx.Node, Problem]:
        """What each product of the graph asks for on a GPU: of weights that were packed, and of packed modules."""
        found = {
            use.node: self._on_gpu(choice.problem, use.weight.config)
            for use, choice in context.choices
            if use.family == "linear" and choice.problem is not None and use.weight.config is not None
        }
        placeholders = dict(zip(context.graph.find_nodes(op="placeholder"), self.inputs, strict=False))
        for node in context.graph.nodes:
            if node not in found and node.target in PRODUCTS:
                matrix = self.recorder.matrices.get(id(placeholders.get(node.args[1])))
                if matrix is not None:
                    found[node] = self._on_gpu(matrix.problem, matrix.config)
        return found

    def _on_gpu(self, problem: Problem, config: LayerConfig) -> Problem:
        rounding = config.activation_bits_on("cuda")
        return dataclasses.replace(
            problem, device="cuda", device_index=0, dtype=self.recorder.dtype, activation_bits=rounding, cascade=False
        )


def _fused(context: Context, problems: Mapping[fx.Node, Problem]) -> list[Problem]:
    """The problems of the launches that the products of ``context`` become."""
    copies: dict[fx.Node, fx.Node] = {}
    graph = fx.Graph()
    graph.output(graph.graph_copy(context.graph, copies))
    of_words = {_as_on_gpu(graph, copies[node], problem, context): problem for node, problem in problems.items()}
    fuse_epilogues(dataclasses.replace(context, graph=graph, choices=[], fusions=Counter()))
    found = []
    for node in graph.nodes:
        if node.target in (LINEAR, FUSED):
            words = node.args[1] if node.target is LINEAR else node.args[3]
            each = [of_words[one] for one in (words if isinstance(words, (list, tuple)) else [words])]
            found.append(dataclasses.replace(each[0], rows=sum(one.rows for one in each)))
    return found


def _as_on_gpu(graph: fx.Graph, product: fx.Node, problem: Problem, context: Context) -> fx.Node:
    """``product`` as the operator of a GPU, on new placeholders for its weight, of which that of the words is returned."""
    schema: Any = product.target._schema  # type: ignore[union-attr]
    given = dict(zip((argument.name for argument in schema.arguments), product.args, strict=False))
    words, scale, offset, codebook = (
        _operand(graph, context, f"{name}_of_{product.name}") for name in ("words", "scale", "offset", "codebook")
    )
    told = (given["bias"], problem.bits, problem.group_size, None if problem.uniform else codebook, problem.activation_bits)
    with graph.inserting_before(product):
        new = graph.call_function(LINEAR, (given["x"], words, scale, None if problem.symmetric else offset, scale, *told))
    new.meta = dict(product.meta)
    product.replace_all_uses_with(new)
    graph.erase_node(product)
    return words


def _operand(graph: fx.Graph, context: Context, name: str) -> fx.Node:
    with graph.inserting_before(next(iter(graph.nodes))):
        node = graph.placeholder(name)
    with context.fake_mode():
        node.meta[VALUE] = torch.empty(1)
    return node

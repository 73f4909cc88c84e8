"""Building blocks of the rules that match products: the marks, the nodes that take the place of one, batches of matrices.

A mark stands for a product on the weight's own placeholder until :mod:`kbit_inductor.passes.lower` turns it into an operator.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from kbit_inductor._compat import OpOverload
from kbit_inductor.capture import VALUE, Context, GraphWeight, Use
from kbit_inductor.passes.values import call_fake
from kbit_inductor.weights.views import Strides, WeightView, transposed

aten = torch.ops.aten


def packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Marks ``linear(x, view of weight, bias)`` in a graph; it is lowered and never called."""
    raise NotImplementedError


def packed_embedding(indices: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Marks ``embedding(indices, weight)`` in a graph; it is lowered and never called."""
    raise NotImplementedError


def packed_batched_linear(x: Tensor, weight: Tensor, index: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Marks ``x[i] @ view of weight[index[i]].T`` for each entry of ``x`` ``[B, M, K]``; it is lowered and never called."""
    raise NotImplementedError


def packed_grouped_linear(x: Tensor, weight: Tensor, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    """Marks ``grouped_mm(x, view of weight.mT, offsets)``; it is lowered and never called."""
    raise NotImplementedError


class Rewriter:
    """Builds the nodes that replace one matched node, just before it."""

    def __init__(self, context: Context, node: fx.Node) -> None:
        self.context = context
        self.node = node

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """A node that calls ``target``; a mark and what is computed from one have no fake value yet."""
        created = self.context.graph.call_function(target, args, kwargs)
        created.meta = {key: value for key, value in self.node.meta.items() if key != VALUE}
        if isinstance(target, OpOverload) and all(VALUE in operand.meta for operand in created.all_input_nodes):
            created.meta[VALUE] = call_fake(self.context, created)
        return created

    def permuted(self, product: fx.Node, dims: tuple[int, ...]) -> fx.Node:
        """``product`` with its dimensions in another order, the result of the matched node and laid out as that one's is.

        What follows may be a view that no other layout allows.
        """
        result: Tensor = self.node.meta[VALUE]
        with self.context.fake_mode():
            ours = torch.empty([result.shape[dims.index(dim)] for dim in range(len(dims))]).permute(dims)
            plain = torch.empty(result.shape)
        permuted = self.call(aten.permute.default, product, list(dims))
        if _equal(result.stride(), ours.stride()) or not _equal(result.stride(), plain.stride()):
            return permuted
        return self.call(aten.clone.default, permuted, memory_format=torch.contiguous_format)

    def linear(self, x: Any, matrix: fx.Node, window: Strides, bias: Any = None) -> fx.Node:
        """``x @ matrix.T + bias`` where ``window`` says where the ``[N, K]`` matrix lies in the memory of node ``matrix``."""
        weight, view, memory, _ = located(self.context, matrix)
        return self.product(x, weight, view.then(memory, window), window.size, bias)

    def product(self, x: Any, weight: GraphWeight, view: WeightView, size: tuple[int, ...], bias: Any = None) -> fx.Node:
        """``x @ matrix.T + bias`` where ``view`` shows the matrix, of ``size`` ``(N, K)``, in ``weight``."""
        marked = self.call(packed_linear, x, weight.node, bias, self.node.meta[VALUE].dtype)
        rows, columns = size
        self.context.uses.append(Use("linear", weight, view, rows, columns, marked))
        return marked

    def look_up(self, indices: Any, table: fx.Node, window: Strides, dtype: torch.dtype) -> fx.Node:
        """The rows ``indices`` of the matrix that lies at ``window`` in the memory of node ``table``, as ``dtype``."""
        weight, view, memory, _ = located(self.context, table)
        marked = self.call(packed_embedding, indices, weight.node, dtype)
        rows, columns = window.size
        self.context.uses.append(Use("embedding", weight, view.then(memory, window), rows, columns, marked))
        return marked

    def size(self, node: fx.Node, dim: int) -> Any:
        """A size of what ``node`` gives: a number, or a node where it is a symbol."""
        size = node.meta[VALUE].shape[dim]
        return size if isinstance(size, int) else self.call(aten.sym_size.int, node, dim)

    def batched(self, mark: Callable[..., Any], x: Any, batch: Batch, where: Any) -> fx.Node:
        """``x`` times the matrices ``[E, N, K]`` of ``batch``, as ``mark`` has it: which of them, ``where`` says."""
        count, rows, columns = batch.window.size
        marked = self.call(mark, x, batch.weight.node, where, self.node.meta[VALUE].dtype)
        family = mark.__name__.removeprefix("packed_")
        view = batch.view.then(batch.memory, batch.window)
        self.context.uses.append(Use(family, batch.weight, view, rows, columns, marked, count))
        return marked

    def sum(self, product: fx.Node, alpha: Any, other: Any, beta: Any) -> fx.Node:
        """``alpha * product + beta * other``, without the factors that are 1."""
        scaled = product if alpha == 1 else self.call(aten.mul.Scalar, product, alpha)
        if beta == 0:
            return scaled
        return self.call(aten.add.Tensor, scaled, other if beta == 1 else self.call(aten.mul.Scalar, other, beta))


@dataclass(frozen=True)
class Batch:
    """Matrices of a weight: ``window`` says where they lie in ``memory``, a layout of the part of it that ``view`` shows.

    ``index`` is the node of the positions of those that are picked, or None for all in order.
    """

    weight: GraphWeight
    view: WeightView
    memory: Strides
    window: Strides
    index: fx.Node | None

    @classmethod
    def of(cls, context: Context, node: Any) -> Batch | None:
        """The batch that ``node`` is, if it is a view of a weight or of a selection with three dimensions."""
        if (picked := context.selected(node)) is not None:
            selection, window = picked
            return cls(selection.weight, selection.view, selection.layout, window, selection.index)
        located = context.locate(node)
        if located is None or len(located[3].size) != 3 or not located[3].size[0]:
            return None
        return cls(*located, None)

    @property
    def transposed(self) -> Batch:
        """The same with each matrix transposed."""
        return dataclasses.replace(self, window=transposed(self.window))


def located(context: Context, node: fx.Node) -> tuple[GraphWeight, WeightView, Strides, Strides]:
    """As :meth:`Context.locate`, of a node that is known to be a view of a weight."""
    found = context.locate(node)
    if found is None:
        raise LookupError(f"{node} is no view of a weight")
    return found


def _equal(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return [str(n) for n in a] == [str(n) for n in b]  # no guard on symbolic sizes

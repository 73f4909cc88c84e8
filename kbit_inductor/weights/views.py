"""How a matrix that a product uses lies in the parameter it comes from."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Strides:
    """Shape, strides and offset (in elements) of a strided tensor."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int = 0

    @classmethod
    def of(cls, tensor: Tensor) -> Strides:
        """The strides of ``tensor``, whose sizes must be plain integers, expanded batch dimensions excepted: they count as 1."""
        size = [1 if batch else extent for extent, batch in zip(tensor.shape, expanded_batch(tensor), strict=True)]
        return cls(tuple(size), tuple(tensor.stride()), int(tensor.storage_offset()))


def expanded_batch(tensor: Tensor) -> list[bool]:
    """For each dimension, whether it is in front of the last two and repeats the same memory."""
    return [isinstance(stride, int) and stride == 0 and dim < tensor.dim() - 2 for dim, stride in enumerate(tensor.stride())]


@dataclass(frozen=True)
class WeightView:
    """A matrix inside a parameter, as a chain of ``(memory, window)`` pairs.

    Each pair says: lay the tensor out in memory as ``memory`` says (a no-op where it already is, a copy where the model casts or
    clones), then look at it through ``window``. However a model spells it (``w.t()``, a slice, ``einsum``), what counts is where
    the elements are, so equal windows of one parameter are the same matrix and are packed once.
    """

    chain: tuple[tuple[Strides, Strides], ...] = ()

    def apply(self, weight: Tensor) -> Tensor:
        """The matrix, as a view of ``weight`` wherever its memory allows."""
        for memory, window in self.chain:
            weight = _seen(_laid_out(weight, memory), memory, window)
        return weight

    def columns(self, weight: Tensor) -> int:
        """The matrix's last size; ``weight`` is not read, and need not hold its values any more."""
        return self.chain[-1][1].size[-1] if self.chain else weight.size(-1)

    def assign(self, weight: Tensor, values: Tensor) -> None:
        """Write ``values`` to where the matrix lies in ``weight``."""
        if not self.chain:
            weight.copy_(values)
            return
        memory, window = self.chain[0]
        laid_out = _laid_out(weight, memory)
        WeightView(self.chain[1:]).assign(_seen(laid_out, memory, window), values)
        if laid_out is not weight:
            weight.copy_(laid_out)

    def then(self, memory: Strides, window: Strides) -> WeightView:
        """This view, laid out as ``memory`` and seen through ``window``."""
        return self if memory == window else WeightView((*self.chain, (memory, window)))


def covers(views: Iterable[WeightView], memory: Strides) -> bool:
    """Whether ``views`` together hold every element of a weight that lies in memory as ``memory`` says."""
    views = list(views)
    if WeightView() in views:
        return True
    seen = torch.empty_strided(memory.size, memory.stride, dtype=torch.bool).fill_(False)
    for view in views:
        view.assign(seen, torch.ones_like(view.apply(seen)))
    return bool(seen.all())


def _laid_out(tensor: Tensor, memory: Strides) -> Tensor:
    if tuple(tensor.shape) == memory.size and tuple(tensor.stride()) == memory.stride:
        return tensor
    return torch.empty_strided(memory.size, memory.stride, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def _seen(tensor: Tensor, memory: Strides, window: Strides) -> Tensor:
    return tensor.as_strided(window.size, window.stride, tensor.storage_offset() + window.offset - memory.offset)


def transposed(window: Strides) -> Strides:
    """``window`` with its last two dimensions exchanged."""
    *size, rows, columns = window.size
    *stride, row_step, column_step = window.stride
    return Strides((*size, columns, rows), (*stride, column_step, row_step), window.offset)


def contiguous(size: tuple[int, ...]) -> Strides:
    """Where a tensor of ``size`` lies in memory when its last dimension is the fastest and nothing is left out."""
    return Strides(size, tuple(math.prod(size[dim + 1 :]) for dim in range(len(size))))


def first_matrix(window: Strides) -> Strides:
    """The first matrix of a batch of them."""
    return Strides(window.size[-2:], window.stride[-2:], window.offset)

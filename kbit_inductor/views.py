"""How a matrix that a product uses lies in the parameter it comes from."""

from __future__ import annotations

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
        current = weight
        for memory, window in self.chain:
            if tuple(current.shape) != memory.size or tuple(current.stride()) != memory.stride:
                laid_out = torch.empty_strided(memory.size, memory.stride, dtype=current.dtype, device=current.device)
                current = laid_out.copy_(current)
            start = current.storage_offset() + window.offset - memory.offset
            current = current.as_strided(window.size, window.stride, start)
        return current

    def then(self, memory: Strides, window: Strides) -> WeightView:
        """This view, laid out as ``memory`` and seen through ``window``."""
        return self if memory == window else WeightView((*self.chain, (memory, window)))


def transposed(window: Strides) -> Strides:
    """``window`` with its last two dimensions exchanged."""
    *size, rows, columns = window.size
    *stride, row_step, column_step = window.stride
    return Strides((*size, columns, rows), (*stride, column_step, row_step), window.offset)


def first_matrix(window: Strides) -> Strides:
    """The first matrix of a batch of them."""
    return Strides(window.size[-2:], window.stride[-2:], window.offset)

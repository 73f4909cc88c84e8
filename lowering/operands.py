"""Whether the operands of a GPU's kernel belong together. A kernel follows pointers: a mistake would be a wrong number there."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from kbit_inductor.kernels.layout import group_count
from kbit_inductor.kernels.words import WordLayout
from kbit_inductor.lowering.errors import OperandMismatchError, WrongDeviceError

Shape = tuple[int, ...]


@functools.cache
def _specs(rows: int, columns: int, bits: int, group_size: int) -> tuple[tuple[str, Shape, torch.dtype], ...]:
    """Name, shape and dtype of the operands of a weight ``[rows, columns]`` in words."""
    layout = WordLayout.of(bits, columns, group_size)
    grid = (group_count(columns, layout.group_size), rows)
    return (
        ("words", (rows, layout.row_words), torch.int16),
        ("scale", grid, torch.float16),
        ("offset", grid, torch.float16),
        ("global_scale", (1,), torch.float32),
        ("codebook", (2**bits,), torch.uint8),
    )


def check_words(
    words: Tensor, scale: Tensor, offset: Tensor | None, global_scale: Tensor, codebook: Tensor | None, columns: int, bits: int,
    group_size: int,
) -> None:  # fmt: skip
    """Whether these are the operands of a weight of ``columns`` columns and codes of ``bits`` in groups of ``group_size``.

    Raises:
        OperandMismatchError: one has another shape, dtype or order in memory, as those of another k have.
    """
    given = (words, scale, offset, global_scale, codebook)
    for tensor, (name, shape, dtype) in zip(given, _specs(words.shape[0], columns, bits, group_size), strict=True):
        if tensor is None:
            continue
        if tensor.shape != shape or tensor.dtype != dtype:
            raise OperandMismatchError(
                f"{name} is {tensor.dtype} {list(tensor.shape)}; a weight of {columns} columns, {bits} bits and groups of "
                f"{group_size} has {dtype} {list(shape)}. Was it packed with other options?"
            )
        if not tensor.is_contiguous():
            raise OperandMismatchError(f"{name} is not contiguous, as a packed weight is; call contiguous() on it")


def check_devices(x: Tensor, **others: Tensor | None) -> None:
    """Whether all that a product or look-up reads is where ``x`` is.

    Raises:
        WrongDeviceError: one of ``others``, by name, is on another device.
    """
    for name, tensor in others.items():
        if tensor is not None and tensor.device != x.device:
            raise WrongDeviceError(
                f"the input is on {x.device}, but {name} of the packed layer on {tensor.device}; move one of them"
            )

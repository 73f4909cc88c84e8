"""Products with a batch of matrices ``[E, N, K]``, the experts of a mixture: schemas, fakes, references and derivatives.

``kbit::batched_linear`` multiplies each entry of a batch by a matrix of its own: the one that ``index`` names, or the one at its
own position. ``kbit::grouped_linear`` takes rows that are sorted by matrix, and where those of each end, as torch's ``grouped_mm``.
As for one matrix, these are the definitions, on any device, and a kernel is an operator with a suffix. The operands of a packed
batch are those of one matrix, stacked: ``planes`` ``[E, k, N, ceil(K / 8)]``, ``scale`` ``[E, N, G]``, ``global_scale`` ``[E, 1]``,
``codebook`` ``[E, 2 ** k]``; on a GPU ``words`` ``[E, N, row_words]`` for ``planes``, and ``scale`` ``[E, G, N]``; on the CPU one
uint8 tensor ``[E, bytes]``. A matrix that no row is multiplied by is not read.

Packed weights are constants: gradients reach ``x`` and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kbit_inductor.kernels import reference
from kbit_inductor.lowering import ops
from kbit_inductor.lowering.gpu import WORDS, dequantize_words

PLANES = "Tensor planes, Tensor scale, Tensor? offset, Tensor global_scale"
SCHEMAS = {
    # activation_bits: 1 to 8, or 16 for x as it is (on the CPU, for a block floating point as exact as its dtype)
    # x [B, M, K]; index [B] of int32 or int64, or None where B is E -> [B, M, N]
    "batched_linear": f"(Tensor x, {PLANES}, Tensor? index, int group_size, Tensor? codebook=None) -> Tensor",
    "batched_linear_triton": (
        f"(Tensor x, {WORDS}, Tensor? index, int bits, int group_size, Tensor? codebook=None, int activation_bits=16) -> Tensor"
    ),
    "batched_linear_cpu": "(Tensor x, Tensor weight, Tensor? index, int rows, int activation_bits) -> Tensor",
    # x [T, K]; offsets [E] of int32 or int64: the row at which those of each matrix end -> [T, N], zeros past the last one
    "grouped_linear": f"(Tensor x, {PLANES}, Tensor offsets, int group_size, Tensor? codebook=None) -> Tensor",
    "grouped_linear_triton": (
        f"(Tensor x, {WORDS}, Tensor offsets, int bits, int group_size, Tensor? codebook=None, int activation_bits=16) -> Tensor"
    ),
    "grouped_linear_cpu": "(Tensor x, Tensor weight, Tensor offsets, int rows, int activation_bits) -> Tensor",
}
GRADIENT_SCHEMAS = {
    # grad [T, N]; matrix [T] of int64: which one each row was multiplied by, E where none -> [T, K]
    "matrices_grad_input": f"(Tensor grad, {PLANES}, Tensor matrix, int group_size, Tensor? codebook, SymInt columns) -> Tensor",
    "matrices_grad_input_triton": (
        f"(Tensor grad, {WORDS}, Tensor matrix, int bits, int group_size, Tensor? codebook, SymInt columns) -> Tensor"
    ),
    "matrices_grad_input_cpu": "(Tensor grad, Tensor weight, Tensor matrix, SymInt columns) -> Tensor",
}
# By the suffix: how many operands a packed batch is, how many numbers of its format follow the index or the offsets, and whether
# then comes a codebook.
PACKED = {"": (4, 1, True), "_triton": (4, 2, True), "_cpu": (1, 0, False)}
# Packed weights of one size, side by side in memory for packed weights. It is never in a graph.
TOOLS = {"stack_cpu": "(Tensor[] weights) -> Tensor"}


def _matrix_of_entries(x: Tensor, index: Tensor | None, count: int) -> Tensor:
    """Which of ``count`` matrices each row of ``x`` ``[B, M, K]`` is multiplied by, int64 ``[B * M]``."""
    if index is None:
        return torch.arange(x.shape[0], device=x.device).repeat_interleave(x.shape[1])
    return torch.where(index < 0, index + count, index).long().repeat_interleave(x.shape[1])


def _matrix_of_rows(x: Tensor, offsets: Tensor, count: int) -> Tensor:
    """Which of ``count`` matrices each row of ``x`` ``[T, K]`` is multiplied by, int64 ``[T]``; ``count`` for none."""
    return torch.searchsorted(offsets.long(), torch.arange(x.shape[0], device=x.device), right=True)


def _unpack(
    planes: Tensor, scale: Tensor, offset: Tensor | None, global_scale: Tensor, group_size: int, codebook: Tensor | None,
    columns: int, dtype: torch.dtype,
) -> Callable[[int], Tensor]:  # fmt: skip
    """The function from a position in the batch to the float matrix that is there."""

    def matrix(i: int) -> Tensor:
        zero, levels = (None if operand is None else operand[i] for operand in (offset, codebook))
        return reference.dequantize(planes[i], scale[i], zero, global_scale[i], columns, group_size, dtype, levels)

    return matrix


def _batched(
    x: Tensor, planes: Tensor, scale: Tensor, offset: Tensor | None, global_scale: Tensor, index: Tensor | None, group_size: int,
    codebook: Tensor | None = None,
) -> Tensor:  # fmt: skip
    count, columns = planes.shape[0], x.shape[2]
    if index is None and x.shape[0] != count:
        raise ValueError(f"x has a batch of {x.shape[0]}, the packed weight one of {count}")
    chosen = _matrix_of_entries(x, index, count)
    if chosen.numel() and not 0 <= int(chosen.min()) <= int(chosen.max()) < count:
        raise IndexError(f"index out of range in a batch of {count} matrices")
    unpack = _unpack(planes, scale, offset, global_scale, group_size, codebook, columns, reference.sum_dtype(x))
    rows = reference.linear_by_row(x.flatten(0, 1), chosen, count, planes.shape[2], unpack)
    return rows.view(*x.shape[:-1], planes.shape[2])


def _grouped(
    x: Tensor, planes: Tensor, scale: Tensor, offset: Tensor | None, global_scale: Tensor, offsets: Tensor, group_size: int,
    codebook: Tensor | None = None,
) -> Tensor:  # fmt: skip
    count = planes.shape[0]
    unpack = _unpack(planes, scale, offset, global_scale, group_size, codebook, x.shape[1], reference.sum_dtype(x))
    return reference.linear_by_row(x, _matrix_of_rows(x, offsets, count), count, planes.shape[2], unpack)


def _batched_triton(*operands: Any) -> Tensor:
    from kbit_inductor.kernels.triton.grouped import batched_linear

    return batched_linear(*operands)


def _grouped_triton(*operands: Any) -> Tensor:
    from kbit_inductor.kernels.triton.grouped import grouped_linear

    return grouped_linear(*operands)


def _grad_input(
    grad: Tensor, planes: Tensor, scale: Tensor, offset: Tensor | None, global_scale: Tensor, matrix: Tensor, group_size: int,
    codebook: Tensor | None, columns: int,
) -> Tensor:  # fmt: skip
    unpack = _unpack(planes, scale, offset, global_scale, group_size, codebook, columns, reference.sum_dtype(grad))
    return reference.linear_by_row(grad, matrix, planes.shape[0], columns, lambda i: unpack(i).t())


def _grad_input_triton(
    grad: Tensor, words: Tensor, scale: Tensor, offset: Tensor | None, global_scale: Tensor, matrix: Tensor, bits: int,
    group_size: int, codebook: Tensor | None, columns: int,
) -> Tensor:  # fmt: skip
    def transposed(i: int) -> Tensor:
        zero, levels = (None if operand is None else operand[i] for operand in (offset, codebook))
        return dequantize_words(words[i], scale[i], zero, global_scale[i], bits, columns, group_size, levels).t()

    return reference.linear_by_row(grad, matrix, words.shape[0], columns, transposed)


def _grad_input_cpu(grad: Tensor, weight: Tensor, matrix: Tensor, columns: int) -> Tensor:
    def transposed(i: int) -> Tensor:
        floats: Tensor = torch.ops.kbit.dequantize_cpu(weight[i], 0, grad.shape[1])
        return floats.t()

    return reference.linear_by_row(grad, matrix, weight.shape[0], columns, transposed)


def _fake(x: Tensor, planes: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], planes.shape[2]))


def _fake_triton(x: Tensor, words: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], words.shape[1]))


def _fake_cpu(x: Tensor, weight: Tensor, where: Tensor | None, rows: int, activation_bits: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


def _grad_input_fake(grad: Tensor, *rest: Any) -> Tensor:
    return grad.new_empty((grad.shape[0], rest[-1]))


def _derive(name: str, matrix_of: Callable[..., Tensor]) -> None:
    """Register the derivative of ``kbit::{name}``, whose rows belong to matrices as ``matrix_of(x, index or offsets, E)`` says.

    It is that of the product with the activations as they came: their rounding passes it straight through.
    """
    suffix = name.removeprefix("batched_linear").removeprefix("grouped_linear")
    operands, numbers, has_codebook = PACKED[suffix]

    def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.columns, ctx.inputs = inputs[0].shape[-1], len(inputs)
        *packed, where = inputs[1 : operands + 2]
        ctx.numbers = inputs[operands + 2 :][:numbers]
        ctx.save_for_backward(*packed, where, inputs[operands + 2 + numbers] if has_codebook else None)

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *packed, where, codebook = ctx.saved_tensors
        matrix = matrix_of(grad, where, packed[0].shape[0])  # grad has as many rows as x
        told = (*ctx.numbers, codebook) if has_codebook else ctx.numbers
        to_x = ops.overload("matrices_grad_input", suffix)(grad.flatten(0, -2), *packed, matrix, *told, ctx.columns)
        return to_x.view(*grad.shape[:-1], ctx.columns), *(None,) * (ctx.inputs - 1)

    torch.library.register_autograd(f"kbit::{name}", backward, setup_context=save)


for _name, _schema in (SCHEMAS | GRADIENT_SCHEMAS).items():
    torch.library.define(f"kbit::{_name}", _schema, tags=(torch.Tag.pt2_compliant_tag,))
for _name, _schema in TOOLS.items():
    torch.library.define(f"kbit::{_name}", _schema)
for _name in SCHEMAS:
    _shape = _fake_cpu if _name.endswith("_cpu") else _fake_triton if _name.endswith("_triton") else _fake
    torch.library.register_fake(f"kbit::{_name}", _shape)
    _derive(_name, _matrix_of_entries if _name.startswith("batched") else _matrix_of_rows)
for _name in GRADIENT_SCHEMAS:
    torch.library.register_fake(f"kbit::{_name}", _grad_input_fake)
torch.library.impl("kbit::batched_linear", "CompositeExplicitAutograd", _batched)
torch.library.impl("kbit::grouped_linear", "CompositeExplicitAutograd", _grouped)
torch.library.impl("kbit::batched_linear_triton", "CUDA", _batched_triton)
torch.library.impl("kbit::grouped_linear_triton", "CUDA", _grouped_triton)
torch.library.impl("kbit::matrices_grad_input_triton", "CompositeExplicitAutograd", _grad_input_triton)
torch.library.impl("kbit::matrices_grad_input", "CompositeExplicitAutograd", _grad_input)
torch.library.impl("kbit::matrices_grad_input_cpu", "CPU", _grad_input_cpu)

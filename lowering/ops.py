"""Schemas, fake implementations, references and derivatives of the ``kbit::`` operators.

``kbit::linear`` and ``kbit::embedding`` are the definitions: any device, plain PyTorch. A kernel is an operator of its own with a
suffix, ``kbit::linear_cpu`` for one, so that a graph shows which kernel it calls. Operands are described in
:mod:`kbit_inductor.kernels.layout`; the operators of the CPU and of the GPU, whose weights have layouts of their own, are in
:mod:`kbit_inductor.lowering.cpu` and :mod:`kbit_inductor.lowering.gpu`.

Packed weights are constants: gradients reach ``x`` and ``bias`` and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kbit_inductor.kernels import reference

Operator = Callable[..., Any]
"""An overload of an operator, ``torch.ops.kbit.linear.default`` for one."""

FAMILIES = {
    "linear": (
        "(Tensor x, Tensor planes, Tensor scale, Tensor? offset, Tensor global_scale, Tensor? bias, int group_size, "
        "Tensor? codebook=None) -> Tensor"
    ),
    "embedding": (
        "(Tensor indices, Tensor planes, Tensor scale, Tensor? offset, Tensor global_scale, int embedding_dim, "
        "int group_size, ScalarType dtype, Tensor? codebook=None) -> Tensor"
    ),
}
GRADIENT_SCHEMA = (
    "(Tensor grad, Tensor planes, Tensor scale, Tensor? offset, Tensor global_scale, SymInt columns, int group_size, "
    "Tensor? codebook=None) -> Tensor"
)
GRADIENT_CHUNK = 1 << 20  # weight elements dequantized at once for a gradient: 4 MB of float32


def define(family: str, suffix: str = "", rounds: bool = False) -> Operator:
    """Define the operator ``kbit::{family}{suffix}`` with the schema, fake and derivative of its family.

    One of ``"linear"`` that ``rounds`` activations has one more argument, ``activation_bits``; its derivative passes the rounding.
    """
    name, schema = f"kbit::{family}{suffix}", FAMILIES[family]
    if rounds:
        schema = schema.replace(") -> Tensor", ", int activation_bits=16) -> Tensor")
    torch.library.define(name, schema, tags=(torch.Tag.pt2_compliant_tag,))
    if family == "linear":
        torch.library.register_fake(name, _linear_fake)
        torch.library.register_autograd(name, _linear_backward, setup_context=_save_operands)
    else:
        torch.library.register_fake(name, _embedding_fake)
    return overload(family, suffix)


def overload(family: str, suffix: str = "") -> Operator:
    """The callable of ``kbit::{family}{suffix}``."""
    found: Operator = getattr(torch.ops.kbit, family + suffix).default
    return found


def _linear_fake(
    x: Tensor,
    planes: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    global_scale: Tensor,
    bias: Tensor | None,
    group_size: int,
    codebook: Tensor | None = None,
    activation_bits: int = 16,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], planes.shape[1]))


def _embedding_fake(
    indices: Tensor,
    planes: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    global_scale: Tensor,
    embedding_dim: int,
    group_size: int,
    dtype: torch.dtype,
    codebook: Tensor | None = None,
) -> Tensor:
    return indices.new_empty((*indices.shape, embedding_dim), dtype=dtype)


def _save_operands(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, planes, scale, offset, global_scale, bias, ctx.group_size, codebook, *ctx.rounding = inputs
    ctx.columns = x.shape[-1]
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(planes, scale, offset, global_scale, codebook)


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    planes, scale, offset, global_scale, codebook = ctx.saved_tensors
    to_x = to_bias = None
    if ctx.needs_input_grad[0]:
        to_x = torch.ops.kbit.linear_grad_input(grad, planes, scale, offset, global_scale, ctx.columns, ctx.group_size, codebook)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[5]:
        to_bias = grad.reshape(-1, grad.shape[-1]).sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return to_x, None, None, None, None, to_bias, None, None, *(None for _ in ctx.rounding)


def _grad_input(
    grad: Tensor,
    planes: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    global_scale: Tensor,
    columns: int,
    group_size: int,
    codebook: Tensor | None = None,
) -> Tensor:
    """``grad @ W`` for ``grad`` ``[..., N]``, with a few rows of ``W`` in float at a time."""
    compute = torch.float64 if grad.dtype == torch.float64 else torch.float32
    total = grad.new_zeros((*grad.shape[:-1], columns), dtype=compute)
    step = max(1, GRADIENT_CHUNK // max(columns, 1))
    for start in range(0, planes.size(1), step):
        rows = slice(start, start + step)
        part_offset = None if offset is None else offset[rows]
        weight = reference.dequantize(
            planes[:, rows], scale[rows], part_offset, global_scale, columns, group_size, compute, codebook
        )
        total += grad[..., rows].to(compute) @ weight
    return total.to(grad.dtype)


def _grad_input_fake(
    grad: Tensor,
    planes: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    global_scale: Tensor,
    columns: int,
    group_size: int,
    codebook: Tensor | None = None,
) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], columns))


def _save_gradient_operands(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, planes, scale, offset, global_scale, _, ctx.group_size, codebook = inputs
    ctx.save_for_backward(planes, scale, offset, global_scale, codebook)


def _grad_input_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    planes, scale, offset, global_scale, codebook = ctx.saved_tensors
    again = torch.ops.kbit.linear(grad, planes, scale, offset, global_scale, None, ctx.group_size, codebook)
    return again, None, None, None, None, None, None, None


def _define_gradient() -> None:
    name = "kbit::linear_grad_input"
    torch.library.define(name, GRADIENT_SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(name, "CompositeExplicitAutograd", _grad_input)
    torch.library.register_fake(name, _grad_input_fake)
    torch.library.register_autograd(name, _grad_input_backward, setup_context=_save_gradient_operands)


_define_gradient()
for _family, _reference in (("linear", reference.linear), ("embedding", reference.embedding)):
    define(_family)
    torch.library.impl(f"kbit::{_family}", "CompositeExplicitAutograd", _reference)

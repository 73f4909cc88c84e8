"""Schemas, fake implementations and derivatives of the operators on a GPU, whose weights are words.

Operands are those of :mod:`kbit_inductor.lowering.ops` but for two: ``words`` (:mod:`kbit_inductor.kernels.words`) in place of
``planes``, and ``scale`` and ``offset`` with groups before rows, ``[G, N]``, so that the rows of a program lie side by side.

Packed weights are constants: gradients reach ``x`` and ``bias`` and nothing else, past the rounding of activations as if there were
none. The fused operator has none.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kbit_inductor.kernels import reference
from kbit_inductor.kernels.layout import pack_codes
from kbit_inductor.kernels.words import WordLayout, unpack_words
from kbit_inductor.lowering import operands, ops
from kbit_inductor.lowering.fitting import launch_fitting
from kbit_inductor.lowering.float_rows import multiplies_in_float
from kbit_inductor.lowering.ops import GRADIENT_CHUNK
from kbit_inductor.lowering.problem import Problem
from kbit_inductor.lowering.tuner.lookup import config_for

if TYPE_CHECKING:
    from kbit_inductor.kernels.triton.config import Config
    from kbit_inductor.kernels.triton.epilogue import Epilogue
    from kbit_inductor.kernels.triton.launch import Matrix
    from kbit_inductor.kernels.triton.norm import Norm

NOT_ROUNDED = 16
HALVES = (torch.float16, torch.bfloat16)
WORDS = "Tensor words, Tensor scale, Tensor? offset, Tensor global_scale"
SCHEMAS = {
    # activation_bits: 1 to 8, FP8 for 8-bit floats, or 16 for x as it is.
    "linear_triton": (
        f"(Tensor x, {WORDS}, Tensor? bias, int bits, int group_size, Tensor? codebook=None, int activation_bits=16) -> Tensor"
    ),
    # residual + activation(norm(x) @ W.T + bias) * factor, of several W side by side, or of the products y, z of two gated ones
    # residual + activation(y) * z.
    # There is a tensor of each kind for every matrix, or none of that kind; a norm only of an x that is rounded.
    "fused_linear_triton": (
        "(Tensor x, Tensor? norm_weight, float eps, Tensor[] words, Tensor[] scale, Tensor[] offset, Tensor[] global_scale, "
        "Tensor[] bias, Tensor[] codebook, int bits, int group_size, str activation, bool gated, Tensor? factor, Tensor? residual, "
        "int activation_bits) -> Tensor"
    ),
    "embedding_triton": (
        f"(Tensor indices, {WORDS}, int embedding_dim, int bits, int group_size, ScalarType dtype, Tensor? codebook=None) -> Tensor"
    ),
    "linear_grad_input_triton": (f"(Tensor grad, {WORDS}, int bits, int group_size, Tensor? codebook, SymInt columns) -> Tensor"),
}


def dequantize_words(
    words: Tensor, scale: Tensor, offset: Tensor | None, global_scale: Tensor, bits: int, columns: int, group_size: int,
    codebook: Tensor | None = None, dtype: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    """The float weight ``[N, columns]``, in plain PyTorch."""
    planes = pack_codes(unpack_words(words, bits, columns, group_size), bits)
    rows_first = None if offset is None else offset.t()
    return reference.dequantize(planes, scale.t(), rows_first, global_scale, columns, group_size, dtype, codebook)


def _linear(
    x: Tensor, words: Tensor, scale: Tensor, offset: Tensor | None, global_scale: Tensor, bias: Tensor | None, bits: int,
    group_size: int, codebook: Tensor | None = None, activation_bits: int = NOT_ROUNDED,
) -> Tensor:  # fmt: skip
    from kbit_inductor.kernels.triton.epilogue import NOTHING
    from kbit_inductor.kernels.triton.launch import Matrix

    matrix = Matrix(words, scale, offset, global_scale, codebook, bias)
    return _products(x, (matrix,), bits, group_size, None, NOTHING, activation_bits)


def _fused_linear(
    x: Tensor, norm_weight: Tensor | None, eps: float, words: list[Tensor], scale: list[Tensor], offset: list[Tensor],
    global_scale: list[Tensor], bias: list[Tensor], codebook: list[Tensor], bits: int, group_size: int, activation: str,
    gated: bool, factor: Tensor | None, residual: Tensor | None, activation_bits: int,
) -> Tensor:  # fmt: skip
    from kbit_inductor.kernels.triton.epilogue import Epilogue
    from kbit_inductor.kernels.triton.launch import Matrix
    from kbit_inductor.kernels.triton.norm import Norm

    operands.check_devices(x, norm_weight=norm_weight, factor=factor, residual=residual)
    nothing = [None] * len(words)
    each = zip(words, scale, offset or nothing, global_scale, codebook or nothing, bias or nothing, strict=True)
    norm = None if norm_weight is None else Norm(norm_weight, eps)
    epilogue = Epilogue(activation, gated, factor, residual)
    return _products(x, tuple(Matrix(*one) for one in each), bits, group_size, norm, epilogue, activation_bits)


def _products(
    x: Tensor, matrices: tuple[Matrix, ...], bits: int, group_size: int, norm: Norm | None, epilogue: Epilogue, activation_bits: int
) -> Tensor:
    """By float weights where there are many rows of x, and a kernel for what follows then; else in one launch."""
    from kbit_inductor.kernels.triton.dequantize import linear_by_float
    from kbit_inductor.kernels.triton.epilogue import apply_epilogue
    from kbit_inductor.kernels.triton.linear import config_of, fused_linear

    for one in matrices:
        operands.check_devices(x, weight=one.words, scale=one.scale, bias=one.bias)
        packed = (one.words, one.scale, one.offset, one.global_scale, one.codebook)
        operands.check_words(*packed, x.shape[-1], bits, group_size)
    n = sum(one.rows for one in matrices)
    problem, rows = _problem(x, matrices[0], n, bits, group_size, activation_bits), rows_of(x)
    if activation_bits == NOT_ROUNDED and x.dtype in HALVES and x.numel() and multiplies_in_float(problem, rows, x.device):
        return apply_epilogue(linear_by_float(x, matrices, bits, group_size), epilogue)
    layout = WordLayout.of(bits, x.size(-1), group_size)
    config = _tuned(problem, matrices, rows, x.device) or config_of(x, n, layout, activation_bits)
    return launch_fitting(
        lambda each: fused_linear(x, matrices, bits, group_size, norm, epilogue, activation_bits, each), config, x.device
    )


def _tuned(problem: Problem, matrices: Sequence[Matrix], m: int, device: torch.device) -> Config | None:
    """The configuration measured for all rows of several matrices, or for those of the largest, which ``kbit tune`` sees alone."""
    found = config_for(problem, m, device)
    if found is not None or len(matrices) == 1:
        return found
    return config_for(dataclasses.replace(problem, rows=max(one.rows for one in matrices)), m, device)


def _problem(x: Tensor, matrix: Matrix, n: int, bits: int, group_size: int, activation_bits: int) -> Problem:
    sizes = (n, x.size(-1), bits, group_size)
    return Problem("linear", "cuda", x.dtype, *sizes, matrix.codebook is None, activation_bits, matrix.offset is None)


def rows_of(x: Tensor) -> int:
    """Of ``x`` ``[..., K]``, all but its last dimension together."""
    return math.prod(x.shape[:-1])


def _linear_bits(*arguments: Any) -> Tensor:
    from kbit_inductor.kernels.triton.bits import linear_bits

    x, planes, scale = arguments[:3]
    operands.check_devices(x, weight=planes, scale=scale)
    return linear_bits(*arguments)


def _embedding(
    indices: Tensor, words: Tensor, scale: Tensor, offset: Tensor | None, global_scale: Tensor, embedding_dim: int, bits: int,
    group_size: int, dtype: torch.dtype, codebook: Tensor | None = None,
) -> Tensor:  # fmt: skip
    from kbit_inductor.kernels.triton.embedding import embedding

    operands.check_devices(indices, weight=words, scale=scale)
    operands.check_words(words, scale, offset, global_scale, codebook, embedding_dim, bits, group_size)
    return embedding(indices, words, scale, offset, global_scale, embedding_dim, bits, group_size, dtype, codebook)


def _linear_fake(x: Tensor, words: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], words.shape[0]))


def _fused_fake(x: Tensor, norm_weight: Tensor | None, eps: float, words: list[Tensor], *rest: Any) -> Tensor:
    gated = rest[8]
    return x.new_empty((*x.shape[:-1], sum(each.shape[0] for each in words) // (2 if gated else 1)))


def _embedding_fake(
    indices: Tensor, words: Tensor, scale: Tensor, offset: Tensor | None, global_scale: Tensor, embedding_dim: int, bits: int,
    group_size: int, dtype: torch.dtype, codebook: Tensor | None = None,
) -> Tensor:  # fmt: skip
    return indices.new_empty((*indices.shape, embedding_dim), dtype=dtype)


def _grad_input_fake(grad: Tensor, *rest: Any) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], rest[-1]))


def _save_operands(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, words, scale, offset, global_scale, bias, ctx.bits, ctx.group_size, codebook, _ = inputs
    ctx.columns = x.shape[-1]
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(words, scale, offset, global_scale, codebook)


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *packed, codebook = ctx.saved_tensors
    to_x = to_bias = None
    if ctx.needs_input_grad[0]:
        to_x = torch.ops.kbit.linear_grad_input_triton(grad, *packed, ctx.bits, ctx.group_size, codebook, ctx.columns)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[5]:
        to_bias = grad.reshape(-1, grad.shape[-1]).sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return to_x, *(None,) * 4, to_bias, *(None,) * 4


def _grad_input(
    grad: Tensor, words: Tensor, scale: Tensor, offset: Tensor | None, global_scale: Tensor, bits: int, group_size: int,
    codebook: Tensor | None, columns: int,
) -> Tensor:  # fmt: skip
    """``grad @ W`` for ``grad`` ``[..., N]``, with a few rows of ``W`` in float at a time."""
    total = grad.new_zeros((*grad.shape[:-1], columns), dtype=torch.float32)
    step = max(1, GRADIENT_CHUNK // max(columns, 1))
    for start in range(0, words.size(0), step):
        rows = slice(start, start + step)
        zero = None if offset is None else offset[:, rows]
        weight = dequantize_words(words[rows], scale[:, rows], zero, global_scale, bits, columns, group_size, codebook)
        total += grad[..., rows].float() @ weight
    return total.to(grad.dtype)


def _save_gradient_operands(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, words, scale, offset, global_scale, ctx.bits, ctx.group_size, codebook, _ = inputs
    ctx.save_for_backward(words, scale, offset, global_scale, codebook)


def _grad_input_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *packed, codebook = ctx.saved_tensors
    return torch.ops.kbit.linear_triton(grad, *packed, None, ctx.bits, ctx.group_size, codebook), *(None,) * 8


ops.define("linear", "_triton_bits", rounds=True)  # of planes, as they are stored
for _name, _schema in SCHEMAS.items():
    torch.library.define(f"kbit::{_name}", _schema, tags=(torch.Tag.pt2_compliant_tag,))
torch.library.register_fake("kbit::linear_triton", _linear_fake)
torch.library.register_fake("kbit::fused_linear_triton", _fused_fake)
torch.library.register_fake("kbit::embedding_triton", _embedding_fake)
torch.library.register_fake("kbit::linear_grad_input_triton", _grad_input_fake)
torch.library.impl("kbit::linear_triton", "CUDA", _linear)
torch.library.impl("kbit::fused_linear_triton", "CUDA", _fused_linear)
torch.library.impl("kbit::linear_triton_bits", "CUDA", _linear_bits)
torch.library.impl("kbit::embedding_triton", "CUDA", _embedding)
torch.library.impl("kbit::linear_grad_input_triton", "CompositeExplicitAutograd", _grad_input)
torch.library.register_autograd("kbit::linear_triton", _linear_backward, setup_context=_save_operands)
torch.library.register_autograd("kbit::linear_grad_input_triton", _grad_input_backward, setup_context=_save_gradient_operands)

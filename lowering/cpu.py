"""Schemas, fake implementations and derivatives of the operators on the CPU.

Their implementations register themselves when the compiled library is loaded. A packed weight is one uint8 tensor, laid out as
``kernels/cpu/tiled.h`` says. Packed weights are constants: gradients reach ``x`` and ``bias`` and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional

from kbit_inductor.kernels.cpu import build
from kbit_inductor.lowering import chain
from kbit_inductor.lowering.errors import WrongDeviceError
from kbit_inductor.lowering.ops import GRADIENT_CHUNK

SCHEMAS = {
    # activation_bits: 1 to 8, or 16 for a block floating point as exact as the dtype of x.
    "linear_cpu": "(Tensor x, Tensor weight, Tensor? bias, int rows, int activation_bits) -> Tensor",
    # linear_cpu of a weight that was packed before the graph was captured: the group size tells the passes what they may merge.
    "tiled_linear_cpu": "(Tensor x, Tensor weight, Tensor? bias, int rows, int activation_bits, int group_size) -> Tensor",
    # residual + activation(rms_norm(x) @ W.T + bias), all weights' side by side; or, gated, activation(first) * second. Computed in
    # float32 and rounded once, to `dtype` or that of x.
    "fused_linear_cpu": (
        "(Tensor x, Tensor? norm_weight, float eps, Tensor[] weights, Tensor?[] biases, int[] rows, str activation, bool gated, "
        "Tensor? residual, int activation_bits, ScalarType? dtype=None) -> Tensor"
    ),
    "embedding_cpu": "(Tensor indices, Tensor weight, int embedding_dim, ScalarType dtype) -> Tensor",
    # Attention of a few queries over a cache: softmax(scale * query @ key.T + mask) @ value, [B, H, M, D] over [B, H / n, L, D].
    "attention_cpu": "(Tensor query, Tensor key, Tensor value, Tensor? mask, float scale, bool causal=False) -> Tensor",
    # New keys and values into caches, turned by their positions; the turned queries: see kbit_inductor.lowering.chain.append.
    "append_cpu": (
        "(Tensor query, Tensor key, Tensor value, Tensor? cos, Tensor? sin, Tensor(a!) keys, Tensor(b!) values, SymInt start, "
        "int[] columns, int heads) -> Tensor"
    ),
    # Several of the others, one after the other: see kbit_inductor.lowering.chain.
    "chain_cpu": "(Tensor[] inputs, int[] program, float[] numbers, str[] activations) -> Tensor[]",
    "caching_chain_cpu": (
        "(Tensor[] inputs, Tensor(a!)[] written, SymInt[] starts, int[] program, float[] numbers, str[] activations) -> ()"
    ),
    "linear_grad_input_cpu": "(Tensor grad, Tensor weight, SymInt columns) -> Tensor",
}
# Not in graphs, so they need neither fakes nor derivatives. In place of an offset, a symmetric grid gives a tensor without rows; in
# place of a codebook (uint8 [2 ** bits], ascending), uniform codes give an empty one; importance is float32 [K], the weight of each
# column's squared error in the search; errors is float64 [N, 2], plain squared error and squared norm of every row in units of
# global_scale.
TOOLS = {
    "quantize_cpu": (
        "(Tensor weight, float global_scale, int bits, int group_size, bool symmetric, float lowest_shrink, float highest_shrink, "
        "int candidates, Tensor? codebook, Tensor? importance=None, int refits=1) "
        "-> (Tensor codes, Tensor scale, Tensor offset, Tensor errors)"
    ),
    "tile_cpu": (
        "(Tensor codes, Tensor scale, Tensor? offset, Tensor global_scale, int bits, int group_size, Tensor? codebook=None, "
        "bool vectors=False, bool cascade=False) -> Tensor"
    ),
    # A weight whose rows are written later, whole blocks of 16 at a time. The rows of a part may be read alone, too.
    "empty_tiled_cpu": (
        "(int rows, int columns, Tensor global_scale, int bits, int group_size, bool symmetric, Tensor? codebook=None, "
        "bool vectors=False, bool cascade=False) -> Tensor"
    ),
    "tile_rows_cpu": "(Tensor(a!) weight, int begin, Tensor codes, Tensor scale, Tensor? offset) -> ()",
    "untile_cpu": (
        "(Tensor weight, int begin=0, int? end=None) "
        "-> (Tensor codes, Tensor scale, Tensor offset, Tensor global_scale, Tensor codebook)"
    ),
    "dequantize_cpu": "(Tensor weight, int begin, int end) -> Tensor",
    "fingerprint": "(Tensor[] tensors) -> int",
    # Of cascades, how many planes are read at most, 0 for all: by this thread, and of one weight by whoever reads it.
    "set_precision_cpu": "(int bits) -> int",
    "limit_planes_cpu": "(Tensor weight, int bits) -> int",
    "isa_cpu": "() -> str",
    "isas_cpu": "() -> str[]",
    "force_isa_cpu": "(str name) -> ()",
}


def _tiled_linear(x: Tensor, weight: Tensor, bias: Tensor | None, rows: int, activation_bits: int, group_size: int) -> Tensor:
    if any(operand is not None and forward_ad.unpack_dual(operand, level=0).tangent is not None for operand in (x, bias)):
        # linear_cpu has a derivative of the reverse mode alone, and would drop the tangent.
        matrix = torch.ops.kbit.linear_grad_input_cpu(torch.eye(rows, dtype=x.dtype, device=x.device), weight, x.shape[-1])
        return functional.linear(x, matrix, bias)
    product: Tensor = torch.ops.kbit.linear_cpu(x, weight, bias, rows, activation_bits)
    return product


def _loading(name: str) -> Callable[..., Any]:
    """What stands for the operator ``name`` until the library is loaded: it loads it.

    A model from a pickle or an exported program may be called before any weight was packed. The library's own kernel is one for the
    CPU's key, which goes before this one.
    """
    operator = getattr(torch.ops.kbit, name).default

    def load(first: Tensor, *rest: Any) -> Any:
        if first.device.type != "cpu":
            raise WrongDeviceError(f"kbit::{name} computes on a CPU and is given a tensor on {first.device}; move it or the model")
        build.load()
        return operator(first, *rest)

    return load


def _linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None, rows: int, activation_bits: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


def _fused_fake(
    x: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    rows: Sequence[int],
    activation: str,
    gated: bool,
    residual: Tensor | None,
    activation_bits: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], sum(rows) // (2 if gated else 1)), dtype=dtype)


def _embedding_fake(indices: Tensor, weight: Tensor, embedding_dim: int, dtype: torch.dtype) -> Tensor:
    return indices.new_empty((*indices.shape, embedding_dim), dtype=dtype)


def _attention_fake(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, causal: bool = False) -> Tensor:
    batch, heads, queries, _ = query.shape
    return query.new_empty((batch, queries, heads, value.shape[-1])).transpose(1, 2)  # the heads of a query lie together


def _append_fake(
    query: Tensor, key: Tensor, value: Tensor, cos: Tensor | None, sin: Tensor | None, keys: Tensor, values: Tensor, start: int,
    columns: Sequence[int], heads: int,
) -> Tensor:  # fmt: skip
    batch, queries, _ = query.shape
    return query.new_empty((batch, queries, heads, keys.shape[3])).transpose(1, 2)


FAKES = chain.Operators(_fused_fake, _attention_fake, _append_fake)


def _chain_fake(
    inputs: Sequence[Tensor], program: Sequence[int], numbers: Sequence[float], activations: Sequence[str]
) -> list[Tensor]:
    return chain.run(inputs, chain.decode(program, numbers, activations), FAKES)


def _caching_chain_fake(*arguments: Any) -> None:
    """It only writes."""


def _save_operands(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, _, _ = inputs
    ctx.columns = x.shape[-1]
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(weight)


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient of the product with the activations as they came: their rounding passes it straight through."""
    (weight,) = ctx.saved_tensors
    to_x = to_bias = None
    if ctx.needs_input_grad[0]:
        to_x = torch.ops.kbit.linear_grad_input_cpu(grad, weight, ctx.columns)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
        to_bias = grad.reshape(-1, grad.shape[-1]).sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return to_x, None, to_bias, None, None


def _grad_input(grad: Tensor, weight: Tensor, columns: int) -> Tensor:
    """``grad @ W`` for ``grad`` ``[..., N]``, with a few rows of ``W`` in float at a time."""
    rows = grad.shape[-1]
    total = grad.new_zeros((*grad.shape[:-1], columns), dtype=torch.float32)
    step = max(1, GRADIENT_CHUNK // max(columns, 1))
    for start in range(0, rows, step):
        end = min(start + step, rows)
        total += grad[..., start:end].float() @ torch.ops.kbit.dequantize_cpu(weight, start, end)
    return total.to(grad.dtype)


def _grad_input_fake(grad: Tensor, weight: Tensor, columns: int) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], columns))


def _save_gradient_operands(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, weight, _ = inputs
    ctx.rows = grad.shape[-1]
    ctx.save_for_backward(weight)


def _grad_input_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (weight,) = ctx.saved_tensors
    return torch.ops.kbit.linear_cpu(grad, weight, None, ctx.rows, 16), None, None


for _name, _schema in SCHEMAS.items():
    if hasattr(torch.ops.kbit, _name):
        continue  # the library was loaded before this package was imported, and brings what exported models call
    torch.library.define(f"kbit::{_name}", _schema, tags=(torch.Tag.pt2_compliant_tag,))
for _name, _schema in TOOLS.items():
    torch.library.define(f"kbit::{_name}", _schema)
for _name in ("linear_cpu", "embedding_cpu", "dequantize_cpu", "untile_cpu"):  # what packed modules call
    torch.library.impl(f"kbit::{_name}", "CompositeExplicitAutograd", _loading(_name))
torch.library.register_fake("kbit::linear_cpu", _linear_fake)
torch.library.register_fake("kbit::fused_linear_cpu", _fused_fake)
torch.library.register_fake("kbit::embedding_cpu", _embedding_fake)
torch.library.register_fake("kbit::attention_cpu", _attention_fake)
torch.library.register_fake("kbit::append_cpu", _append_fake)
torch.library.register_fake("kbit::chain_cpu", _chain_fake)
torch.library.register_fake("kbit::caching_chain_cpu", _caching_chain_fake)
torch.library.register_fake("kbit::linear_grad_input_cpu", _grad_input_fake)
torch.library.impl("kbit::linear_grad_input_cpu", "CPU", _grad_input)
# It is taken apart before autograd, so whatever compiles it sees linear_cpu.
torch.library.impl("kbit::tiled_linear_cpu", "CompositeImplicitAutograd", _tiled_linear)
torch.library.register_autograd("kbit::linear_cpu", _linear_backward, setup_context=_save_operands)
torch.library.register_autograd("kbit::linear_grad_input_cpu", _grad_input_backward, setup_context=_save_gradient_operands)

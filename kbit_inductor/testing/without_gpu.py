"""A GPU's graphs and operators on a machine that has none: fake tensors for what passes do, plain PyTorch for what they compute."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kbit_inductor._compat import FakeTensorMode, scoped_library
from kbit_inductor.debug.exact import ACTIVATIONS
from kbit_inductor.kernels import reference
from kbit_inductor.lowering.gpu import dequantize_words


@contextlib.contextmanager
def operators_on_cpu() -> Iterator[None]:
    """Let the operators of a GPU take tensors of a CPU, as plain PyTorch that sums in float32."""
    with scoped_library("kbit", "IMPL") as library:
        for name, function in (("linear", _linear), ("fused_linear", _fused), ("embedding", _embedding)):
            library.impl(f"{name}_triton", function, "CPU")
        yield


def fake_gpu_model(model: nn.Module, mode: FakeTensorMode, device: str = "cuda:0") -> nn.Module:
    """A copy of ``model`` whose parameters and buffers are fake tensors of ``mode`` on a GPU that need not be there.

    Call it, and capture it by :func:`kbit_inductor.testing.rewrite`, inside of ``mode`` and on fake inputs.
    """
    moved = copy.deepcopy(model)
    made: dict[int, Tensor] = {}  # tied tensors stay tied
    with mode:
        for tensor in [*moved.parameters(), *moved.buffers()]:
            fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
            made[id(tensor)] = nn.Parameter(fake, requires_grad=False) if isinstance(tensor, nn.Parameter) else fake
    for module in moved.modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for table in tables:
            table.update({name: made[id(tensor)] for name, tensor in table.items() if tensor is not None})
    return moved


def _linear(
    x: Tensor, words: Tensor, scale: Tensor, offset: Tensor | None, global_scale: Tensor, bias: Tensor | None, bits: int,
    group_size: int, codebook: Tensor | None = None, activation_bits: int = 16,
) -> Tensor:  # fmt: skip
    if activation_bits < 16:
        rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
        x = reference.round_activations(rows, group_size, activation_bits).view(x.shape).to(x.dtype)
    weight = dequantize_words(words, scale, offset, global_scale, bits, x.shape[-1], group_size, codebook)
    return functional.linear(x.float(), weight, None if bias is None else bias.float()).to(x.dtype)


def _fused(
    x: Tensor, norm_weight: Tensor | None, eps: float, words: list[Tensor], scale: list[Tensor], offset: list[Tensor],
    global_scale: list[Tensor], bias: list[Tensor], codebook: list[Tensor], bits: int, group_size: int, activation: str,
    gated: bool, factor: Tensor | None, residual: Tensor | None, activation_bits: int,
) -> Tensor:  # fmt: skip
    nothing = [None] * len(words)
    wide = x.float() if norm_weight is None else functional.rms_norm(x.float(), x.shape[-1:], norm_weight.float(), eps)
    parts = [
        _linear(wide, w, s, o, g, b, bits, group_size, c, activation_bits)
        for w, s, o, g, b, c in zip(
            words, scale, offset or nothing, global_scale, bias or nothing, codebook or nothing, strict=True
        )
    ]
    y = ACTIVATIONS[activation](parts[0]) * parts[1] if gated else ACTIVATIONS[activation](torch.cat(parts, dim=-1))
    y = y if factor is None else y * factor
    return (y if residual is None else residual + y).to(x.dtype)


def _embedding(
    indices: Tensor, words: Tensor, scale: Tensor, offset: Tensor | None, global_scale: Tensor, embedding_dim: int, bits: int,
    group_size: int, dtype: torch.dtype, codebook: Tensor | None = None,
) -> Any:  # fmt: skip
    return dequantize_words(words, scale, offset, global_scale, bits, embedding_dim, group_size, codebook, dtype)[indices]

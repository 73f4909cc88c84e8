"""What a graph means: the same graph in float64, on the weights that packed ones stand for, with no activation rounded.

Rounding is then fifteen digits away, so two graphs that mean the same agree in all but the last few, and a dropped bias or a wrong
group stands out whatever the bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from kbit_inductor._compat import OpOverload, hint
from kbit_inductor.lowering import chain

FAMILIES = ("batched_linear", "grouped_linear", "linear", "embedding")
WIDE = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex64: torch.complex128,
}
CASTS = ("float", "half", "bfloat16", "double")
AUTOCAST = ("_enter_autocast", "_exit_autocast")
Dense = Mapping[int, Tensor]
"""The float64 weight, ``[N, K]`` or ``[E, N, K]``, of a packed one, by ``id`` of its first operand."""

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "": lambda x: x,
    "relu": functional.relu,
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}


def widen(value: Any) -> Any:
    """``value``, a tensor, dtype, or list or tuple of such, in float64; integers and whatever else stay as they are."""
    if isinstance(value, (list, tuple)):
        return type(value)(widen(item) for item in value) if type(value) in (list, tuple) else value
    if isinstance(value, torch.dtype):
        return WIDE.get(value, value)
    return value.to(WIDE[value.dtype]) if isinstance(value, Tensor) and value.dtype in WIDE else value


class Concrete(fx.Interpreter):
    """Runs a graph on real values, where symbolic sizes that are arguments of a node count as what they are in this call."""

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[Any, Any]:
        """The arguments of ``n``, without symbols."""
        fetched = super().fetch_args_kwargs_from_env(n)
        return fx.node.map_aggregate(fetched, lambda value: hint(value) if isinstance(value, torch.SymInt) else value)


class Exact(Concrete):
    """Runs ``gm`` in float64. Inputs that the graph writes to must be the caller's own copies."""

    def __init__(self, gm: fx.GraphModule, dense: Dense, recorder: dict[str, Any] | None = None) -> None:
        super().__init__(gm)
        self.dense = dense
        self.recorder = recorder

    def run_node(self, n: fx.Node) -> Any:
        """The value of ``n``, widened; the recorder gets a copy by the name of ``n``, since it may be written to later."""
        value = widen(super().run_node(n))
        if self.recorder is not None:
            self.recorder[n.name] = value.clone() if isinstance(value, Tensor) else value
        return value

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """As a packed operator is defined, or torch's own operator on wide operands."""
        if getattr(target, "__name__", "") in AUTOCAST:
            return None
        if (definition := definition_of(target)) is not None:
            return definition(self.dense, *args, **kwargs)
        if getattr(target, "__name__", "").startswith("fake_quantize"):  # it takes no float64, nor would it round the same
            narrow = [a.float() if isinstance(a, Tensor) and a.dtype == torch.float64 else a for a in args]
            return super().call_function(target, tuple(narrow), kwargs)
        return super().call_function(target, widen(args), {key: widen(value) for key, value in kwargs.items()})

    def call_method(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A method on wide operands; a cast to a narrower float does nothing."""
        if target in CASTS:
            return args[0].double()
        return super().call_method(target, widen(args), {key: widen(value) for key, value in kwargs.items()})


def definition_of(target: Any) -> Callable[..., Any] | None:
    """``(dense, *arguments) -> result`` in float64, of the packed operator ``target``; None when it is none."""
    if not isinstance(target, OpOverload) or target.namespace != "kbit":
        return None
    name = target._schema.name.removeprefix("kbit::").removeprefix("tiled_")  # packed before, by quantize_
    if name in WHOLE:
        return WHOLE[name]
    family = next((each for each in FAMILIES if name.startswith(each)), None)
    if family is None or "grad_input" in name:
        return None
    planes = target._schema.arguments[1].name in ("planes", "words")  # what follows them is the same
    return BY_FAMILY[family, "planes" if planes else "tiled"]


def _dense(dense: Dense, weight: Tensor) -> Tensor:
    """The float64 form of a packed weight of the CPU. One that ``kbit_inductor.quantize_`` packed is in no slot of the graph."""
    known = dense.get(id(weight))
    if known is not None:
        return known
    rows = torch.ops.kbit.untile_cpu(weight)[0].shape[0]
    return torch.ops.kbit.dequantize_cpu(weight, 0, rows).double()  # type: ignore[no-any-return]


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return functional.linear(x.double(), weight, None if bias is None else bias.double())


def _fused(
    dense: Dense, x: Tensor, norm_weight: Tensor | None, eps: float, weights: Sequence[Tensor], biases: Sequence[Tensor | None],
    rows: Sequence[int], activation: str, gated: bool, residual: Tensor | None, activation_bits: int,
    dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    x = x.double()
    if norm_weight is not None:
        x = functional.rms_norm(x, x.shape[-1:], norm_weight.double(), eps)
    parts = [_linear(x, _dense(dense, weight), bias) for weight, bias in zip(weights, biases, strict=True)]
    act = ACTIVATIONS[activation]
    y = act(parts[0]) * parts[1] if gated else act(torch.cat(parts, dim=-1))
    return y if residual is None else residual.double() + y


def _fused_words(
    dense: Dense, x: Tensor, norm_weight: Tensor | None, eps: float, words: Sequence[Tensor], scale: Any, offset: Any,
    global_scale: Any, bias: Sequence[Tensor], codebook: Any, bits: int, group_size: int, activation: str, gated: bool,
    factor: Tensor | None, residual: Tensor | None, activation_bits: int,
) -> Tensor:  # fmt: skip
    y = _fused(dense, x, norm_weight, eps, words, bias or [None] * len(words), (), activation, gated, None, activation_bits)
    y = y if factor is None else y * factor.double()
    return y if residual is None else residual.double() + y


def _attention(
    dense: Dense, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, causal: bool = False
) -> Tensor:
    mask = mask if mask is None or mask.dtype == torch.bool else mask.double()
    q, k, v = query.double(), key.double(), value.double()
    return functional.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=True)


def _chain(
    dense: Dense, inputs: Sequence[Tensor], program: Sequence[int], numbers: Sequence[float], activations: Sequence[str]
) -> list[Tensor]:
    return chain.run(inputs, chain.decode(program, numbers, activations), _steps(dense))


def _caching_chain(
    dense: Dense, inputs: Sequence[Tensor], written: Sequence[Tensor], starts: Sequence[int], program: Sequence[int],
    numbers: Sequence[float], activations: Sequence[str],
) -> None:  # fmt: skip
    count, *program = program
    steps = chain.decode(program, numbers, activations)
    results = chain.run([*inputs, *written[count:]], steps, _steps(dense), starts)
    for place, result in zip(written[:count], results, strict=True):
        place.copy_(result)


def _steps(dense: Dense) -> chain.Operators:
    return chain.Operators(functools.partial(_fused, dense), functools.partial(_attention, dense), _append)


def _append(*operands: Any) -> Tensor:
    return chain.append(*(widen(operand) if isinstance(operand, Tensor) else operand for operand in operands))


def _batched(dense: Dense, x: Tensor, weight: Tensor, index: Tensor | None) -> Tensor:
    matrices = _dense(dense, weight)
    return x.double() @ (matrices if index is None else matrices[index.long()]).mT


def _grouped(dense: Dense, x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    matrices = _dense(dense, weight)
    out = matrices.new_zeros(x.shape[0], matrices.shape[1])
    begin = 0
    for matrix, end in zip(matrices, offsets.tolist(), strict=True):
        out[begin:end] = x[begin:end].double() @ matrix.t()
        begin = end
    return out


WHOLE: Mapping[str, Callable[..., Any]] = {
    "fused_linear_cpu": _fused,
    "fused_linear_triton": _fused_words,
    "append_cpu": lambda dense, *operands: _append(*operands),
    "caching_chain_cpu": _caching_chain,
    "chain_cpu": _chain,
    "attention_cpu": _attention,
}
# The arguments of a family's operators by the layout that they read: planes, scale, offset, global_scale, … or one weight, …
BY_FAMILY: Mapping[tuple[str, str], Callable[..., Any]] = {
    ("linear", "planes"): lambda dense, x, planes, s, z, g, bias, *_: _linear(x, dense[id(planes)], bias),
    ("linear", "tiled"): lambda dense, x, weight, bias, *_: _linear(x, _dense(dense, weight), bias),
    ("embedding", "planes"): lambda dense, indices, planes, *_: functional.embedding(indices, dense[id(planes)]),
    ("embedding", "tiled"): lambda dense, indices, weight, *_: functional.embedding(indices, _dense(dense, weight)),
    ("batched_linear", "planes"): lambda dense, x, planes, s, z, g, index, *_: _batched(dense, x, planes, index),
    ("batched_linear", "tiled"): lambda dense, x, weight, index, *_: _batched(dense, x, weight, index),
    ("grouped_linear", "planes"): lambda dense, x, planes, s, z, g, offsets, *_: _grouped(dense, x, planes, offsets),
    ("grouped_linear", "tiled"): lambda dense, x, weight, offsets, *_: _grouped(dense, x, weight, offsets),
}

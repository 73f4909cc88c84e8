"""Each packed operator of a graph, on the very values that reach it, against its definition: which node first left its bound."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from kbit_inductor._compat import OpOverload
from kbit_inductor.debug.exact import ACTIVATIONS, FAMILIES, Concrete, widen
from kbit_inductor.kernels import reference
from kbit_inductor.lowering import chain
from kbit_inductor.testing.bounds import Grid, product, rounded

UNIT = 2.0**-24
SLOPE = 1.2  # of every activation that kernels fuse, at most
Grids = Mapping[int, "Grid | list[Grid]"]
"""The grid of a packed weight, or those of a batch, by ``id`` of its first operand."""


class NodeError(AssertionError):
    """A packed operator that is farther from its definition than its bound."""

    def __init__(self, node: str, excess: float) -> None:
        super().__init__(f"node {node!r} is {excess:.3g} times its bound of rounding away from its definition")
        self.node = node


class Checking(Concrete):
    """Runs a graph and checks each packed operator in it.

    Raises:
        NodeError: (from ``run``) the first that is too far off.
    """

    def __init__(self, gm: fx.GraphModule, grids: Grids) -> None:
        super().__init__(gm)
        self.extra_traceback = False  # the message is ours
        self.grids = grids
        self.checked = 0

    def run_node(self, n: fx.Node) -> Any:
        """The value of ``n``, checked if it is that of a packed operator."""
        result = super().run_node(n)
        if n.op == "call_function" and isinstance(n.target, OpOverload) and n.target.namespace == "kbit":
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            excess = _excess(self.grids, n.target, (*args, *kwargs.values()), result)
            if excess is not None:
                self.checked += 1
                if not excess <= 1:
                    raise NodeError(n.name, excess)
        return result


def _excess(grids: Grids, target: OpOverload, args: tuple[Any, ...], result: Any) -> float | None:
    """The error of ``result`` in units of its bound; None for an operator without a definition here."""
    name = target._schema.name.removeprefix("kbit::")
    if name == "chain_cpu":
        inputs, *program = args
        return _chain_excess(grids, inputs, (), program, result)
    if name == "caching_chain_cpu":
        inputs, written, starts, (count, *program), *rest = args
        return _chain_excess(grids, [*inputs, *written[count:]], starts, [program, *rest], written[:count])
    if name in WHOLE:
        return _over(result, *WHOLE[name](grids, *args))
    family = next((each for each in FAMILIES if name.startswith(each)), None)
    if family is None or "grad_input" in name:
        return None
    told = dict(zip((argument.name for argument in target._schema.arguments), args, strict=False))
    planes = "weight" not in told
    where = args[5 if planes else 2]
    bits = told.get("activation_bits", 16)
    if planes:
        bits = _rounding(bits)
    grid: Any = grids[id(args[1])]
    if family == "linear":
        return _over(result, *product(args[0], grid, where, bits))
    if family == "embedding":
        return _over(result, *_embedding(grid, args[0], result.dtype))
    if family == "batched_linear":
        return _over(result, *_batched(grid, args[0], where, bits))
    return _over(result, *_grouped(grid, args[0], where, bits))


def _rounding(activation_bits: int) -> int | None:
    """What activations are rounded to by an operator that is not the CPU's, of which 16 bits are a rounding too."""
    return activation_bits if activation_bits < 16 else None


def _over(actual: Tensor, exact: Tensor, bound: Tensor) -> float:
    if actual.shape != exact.shape:
        return float("inf")
    excess = (actual.double() - exact).abs() / bound
    return float(excess.nan_to_num(float("inf")).max()) if excess.numel() else 0.0


def _embedding(grid: Grid, indices: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    exact = grid.weight[indices.long()]
    return exact, rounded(exact, 4 * UNIT * grid.magnitude[indices.long()], dtype)


def _batched(grids: list[Grid], x: Tensor, index: Tensor | None, bits: int | None) -> tuple[Tensor, Tensor]:
    chosen = range(len(grids)) if index is None else index.tolist()
    pairs = [product(rows, grids[i], None, bits) for rows, i in zip(x, chosen, strict=True)]
    exact, bound = (torch.stack(each) for each in zip(*pairs, strict=True))
    return exact, bound


def _grouped(grids: list[Grid], x: Tensor, offsets: Tensor, bits: int | None) -> tuple[Tensor, Tensor]:
    exact = torch.zeros(x.shape[0], grids[0].weight.shape[0], dtype=torch.float64)
    bound = torch.full_like(exact, torch.finfo(x.dtype).smallest_normal)
    begin = 0
    for grid, end in zip(grids, offsets.tolist(), strict=True):
        exact[begin:end], bound[begin:end] = product(x[begin:end], grid, None, bits)
        begin = end
    return exact, bound


def _fused(
    grids: Any, x: Tensor, norm_weight: Tensor | None, eps: float, weights: Sequence[Tensor], biases: Sequence[Tensor | None],
    rows: Sequence[int], activation: str, gated: bool, residual: Tensor | None, bits: int, dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    spread, wanted = None, dtype or x.dtype
    if norm_weight is not None:
        normed = functional.rms_norm(x.double(), x.shape[-1:], norm_weight.double(), eps)
        spread = (x.shape[-1] + 8) * UNIT
        x = normed.to(x.dtype)
    parts = [_part(x, grids[id(weight)], bias, bits, spread) for weight, bias in zip(weights, biases, strict=True)]
    first, slack = parts[0]
    if not gated:
        first, slack = (torch.cat(each, dim=-1) for each in zip(*parts, strict=True))
    return _epilogue(first, slack, activation, parts[1] if gated else None, residual, wanted)


def _fused_words(
    grids: Any, x: Tensor, norm_weight: Tensor | None, eps: float, words: Sequence[Tensor], scale: Any, offset: Any,
    global_scale: Any, bias: Sequence[Tensor], codebook: Any, bits: int, group_size: int, activation: str, gated: bool,
    factor: Tensor | None, residual: Tensor | None, activation_bits: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    told: Sequence[Tensor | None] = bias or [None] * len(words)
    dtype, rounding, spread = x.dtype, _rounding(activation_bits), None
    if norm_weight is not None:
        x = functional.rms_norm(x.double(), x.shape[-1:], norm_weight.double(), eps).float()
        spread = (x.shape[-1] + 16) * UNIT
    parts = [_part(x, grids[id(weight)], one, rounding, spread) for weight, one in zip(words, told, strict=True)]
    if gated:
        return _epilogue(*parts[0], activation, parts[1], residual, dtype)
    gate = None if factor is None else (factor.double(), torch.zeros_like(factor, dtype=torch.float64))
    first, slack = (torch.cat(each, dim=-1) for each in zip(*parts, strict=True))
    return _epilogue(first, slack, activation, gate, residual, dtype)


def _epilogue(
    first: Tensor, slack: Tensor, activation: str, factor: tuple[Tensor, Tensor] | None, residual: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """``residual + activation(first) * factor`` and its bound, from those of ``first`` and ``factor``, in float64."""
    exact = ACTIVATIONS[activation](first)
    bound = slack if not activation else SLOPE * slack + 16 * UNIT * (first.abs() + 1)
    if factor is not None:
        second, more = factor
        exact, bound = exact * second, exact.abs() * more + second.abs() * bound + bound * more
    if residual is not None:
        bound = bound + UNIT * (residual.double().abs() + exact.abs())
        exact = residual.double() + exact
    return exact, rounded(exact, bound, dtype)


def _part(x: Tensor, grid: Grid, bias: Tensor | None, bits: int | None, spread: float | None) -> tuple[Tensor, Tensor]:
    """A product whose ``x`` is known to the relative ``spread``: near the middle of a step it may be rounded either way."""
    exact, bound = product(x, grid, bias, bits)
    if spread is not None and bits is not None:
        rows = x.reshape(-1, x.shape[-1])
        # A value may be off by its spread, and the step that it is divided by too.
        ends = [reference.round_activations(rows, grid.group_size, bits, sign * 2 * spread) for sign in (-1, 1)]
        either = (ends[1] - ends[0]).abs() + spread * rows.double().abs()
        bound = bound + (either @ grid.weight.abs().t()).view_as(bound)
    return exact, bound


def _attention(
    grids: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, causal: bool = False
) -> tuple[Tensor, Tensor]:
    repeat = query.shape[1] // max(key.shape[1], 1)
    q, k, v = query.double(), *(each.double().repeat_interleave(repeat, 1) for each in (key, value))
    scores, size = scale * q @ k.mT, abs(scale) * q.abs() @ k.abs().mT
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.double()
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    p = scores.softmax(-1).masked_fill((scores == -torch.inf).all(-1, keepdim=True), 0)
    if not size.numel():
        return p @ v, torch.zeros_like(p @ v)  # a sum of nothing, or nothing
    off = 2 * (2 * (q.shape[-1] + 4) * UNIT * size.amax(-1, keepdim=True) + (k.shape[2] + 16) * UNIT)
    exact = p @ v
    return exact, rounded(exact, 4 * off * (p @ v.abs()), query.dtype)


def _append_excess(query: Tensor, operands: tuple[Any, ...]) -> float:
    """The error of what ``append_cpu`` gave for ``operands`` and of what it put into the caches."""
    keys, values, start = operands[5:8]

    def outcome(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        place = slice(start, start + query.shape[2])
        return torch.cat([each.flatten() for each in (query, keys[:, :, place], values[:, :, place])])

    def defined(*operands: Any) -> Tensor:
        keys, values = (each.clone() for each in operands[5:7])
        called = [*operands[:5], keys, values, *operands[7:]]
        return outcome(chain.append(*called), keys, values)

    exact = defined(*widen(operands))
    # Two products and their sum are three roundings of at most the terms without their signs, whichever half has the minus.
    sizes = [each.abs() if isinstance(each, Tensor) else each for each in widen(operands)]
    turned = [-each if i == 4 and each is not None else each for i, each in enumerate(sizes)]
    terms = torch.maximum(defined(*sizes).abs(), defined(*turned).abs())
    return _over(outcome(query, keys, values), exact, rounded(exact, 4 * UNIT * terms, query.dtype))


def _chain_excess(
    grids: Any, inputs: Sequence[Tensor], starts: Sequence[int], program: Sequence[Any], result: Sequence[Tensor]
) -> float:
    """That of the worst step, each run by its own operator; a chain gives bit for bit what its steps give."""
    worst = 0.0

    def checked(operator: Callable[..., Tensor], excess: Callable[..., float]) -> Callable[..., Tensor]:
        def call(*operands: Any) -> Tensor:
            nonlocal worst
            value = operator(*operands)
            worst = max(worst, excess(value, operands))
            return value

        return call

    kbit = torch.ops.kbit
    # Caches hold what the chain appended; the steps append it again, to the same places.
    operators = chain.Operators(
        checked(kbit.fused_linear_cpu, lambda value, operands: _over(value, *_fused(grids, *operands))),
        checked(kbit.attention_cpu, lambda value, operands: _over(value, *_attention(grids, *operands))),
        checked(kbit.append_cpu, _append_excess),
    )
    returned = chain.run(inputs, chain.decode(*program), operators, starts)
    same = all(torch.equal(a, b) for a, b in zip(result, returned, strict=True))
    return worst if same else float("inf")


WHOLE: Mapping[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "fused_linear_cpu": _fused,
    "fused_linear_triton": _fused_words,
    "attention_cpu": _attention,
}

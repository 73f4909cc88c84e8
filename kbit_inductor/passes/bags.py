"""``embedding_bag`` as a look-up in a packed table and a sum over each bag, in float32.

Bags are rows of indices ``[B, L]``, or parts of a list of them ``[n]`` that begin at ``offsets`` ``[B]``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from kbit_inductor.capture import VALUE
from kbit_inductor.passes.rewriter import Rewriter

aten = torch.ops.aten


def embedding_bag(
    rewriter: Rewriter,
    input: Any,
    weight: Any,
    offsets: Any = None,
    max_norm: Any = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Any = None,
    include_last_offset: bool = False,
    padding_idx: Any = None,
) -> fx.Node | None:
    """The rule for ``functional.embedding_bag``: None for one that stays in float, which is explained."""
    context, located = rewriter.context, rewriter.context.locate(weight)
    if located is None or len(located[3].size) != 2:
        return None
    if reason := _obstacle(input, offsets, mode, padding_idx):
        context.explain(located[0], f"embedding_bag {reason} stays in float")
        return None
    rows = rewriter.look_up(input, weight, located[3], torch.float32)
    if per_sample_weights is not None:
        scales = rewriter.call(aten._to_copy.default, per_sample_weights, dtype=torch.float32)
        rows = rewriter.call(aten.mul.Tensor, rows, rewriter.call(aten.unsqueeze.default, scales, -1))
    if offsets is None:
        bags = _over_rows(rewriter, rows, mode)
    else:
        bags = _over_parts(rewriter, rows, input, offsets, mode, include_last_offset)
    dtype = rewriter.node.meta[VALUE].dtype
    return bags if dtype == torch.float32 else rewriter.call(aten._to_copy.default, bags, dtype=dtype)


def _obstacle(input: Any, offsets: Any, mode: str, padding_idx: Any) -> str:
    """What keeps these bags from being packed, or ""."""
    if padding_idx is not None:
        return "with a padding_idx"
    if offsets is not None:
        return "of maxima over bags of different lengths" if mode == "max" else ""
    length = input.meta[VALUE].shape[-1]
    return "" if mode == "sum" or isinstance(length, int) else f"of bags of {length} entries"


def _over_rows(rewriter: Rewriter, rows: fx.Node, mode: str) -> fx.Node:
    over = {"sum": aten.sum.dim_IntList, "mean": aten.mean.dim, "max": aten.amax.default}[mode]
    return rewriter.call(over, rows, [1])


def _over_parts(rewriter: Rewriter, rows: fx.Node, input: Any, offsets: Any, mode: str, include_last_offset: bool) -> fx.Node:
    """Sums or means of ``rows`` ``[n, D]`` over parts. An empty one is 0."""
    if include_last_offset:
        offsets = rewriter.call(aten.slice.Tensor, offsets, 0, 0, -1)
    result: Any = rewriter.node.meta[VALUE]
    device, width = result.device, result.shape[1]
    places = rewriter.call(aten.arange.default, rewriter.size(input, 0), device=device)
    bag = rewriter.call(aten.sub.Tensor, rewriter.call(aten.bucketize.Tensor, places, offsets, right=True), 1)
    count = rewriter.size(offsets, 0)
    zeros = rewriter.call(aten.zeros.default, [count, width], dtype=torch.float32, device=device)
    sums = rewriter.call(aten.index_add.default, zeros, 0, bag, rows)
    if mode == "sum":
        return sums
    none = rewriter.call(aten.zeros.default, [count], dtype=torch.float32, device=device)
    ones = rewriter.call(aten.ones_like.default, places, dtype=torch.float32)
    sizes = rewriter.call(aten.clamp.default, rewriter.call(aten.index_add.default, none, 0, bag, ones), 1)
    return rewriter.call(aten.div.Tensor, sums, rewriter.call(aten.unsqueeze.default, sizes, 1))

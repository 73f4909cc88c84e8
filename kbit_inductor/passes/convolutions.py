"""Convolutions as products: what lies under the kernel at each position becomes a row, the kernel ``[N, C, *size]`` a matrix.

The rows are views of the padded input until they are laid out side by side, so a kernel of one element costs no copy, and one that
is moved by its own size (the patches of a vision transformer) a single pass. The same in one, two and three dimensions.

Chellapilla, Puri and Simard, "High Performance Convolutional Neural Networks for Document Processing", 2006 (im2col).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from kbit_inductor.passes.rewriter import Batch, Rewriter, packed_batched_linear
from kbit_inductor.weights.views import contiguous

aten = torch.ops.aten


def convolution(
    rewriter: Rewriter,
    input: Any,
    weight: Any,
    bias: Any,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> fx.Node | None:
    """The rule for ``aten.convolution``: None for one that stays in float, which is explained."""
    located = rewriter.context.locate(weight)
    if located is None:
        return None
    kernel, view, memory, window = located
    rows, channels, *size = window.size
    if transposed:
        rewriter.context.explain(kernel, "used by a transposed convolution")
        return None
    if groups > 1 and channels == 1:
        rewriter.context.explain(kernel, f"used by a depthwise convolution, whose products have {math.prod(size)} terms")
        return None
    columns = _columns(rewriter, input, size, stride, padding, dilation)
    view, laid_out = view.then(memory, window), contiguous(window.size)
    matrix = (rows // groups, math.prod(window.size[1:]))
    if groups == 1:
        flat = rewriter.call(aten.flatten.using_ints, columns, 1 + len(size))
        whole = view.then(laid_out, contiguous(matrix))
        return _channels_second(rewriter, rewriter.product(flat, kernel, whole, matrix, bias), len(size))
    batch = Batch(kernel, view, laid_out, contiguous((groups, *matrix)), None)
    return _grouped(rewriter, columns, batch, bias, len(size))


def _columns(
    rewriter: Rewriter, x: Any, size: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> fx.Node:
    """``[B, C, *extent]`` to what lies under the kernel, ``[B, *positions, C, *size]``."""
    if any(padding):
        x = rewriter.call(aten.constant_pad_nd.default, x, [p for p in reversed(padding) for _ in range(2)])
    for dim, (extent, step, gap) in enumerate(zip(size, stride, dilation, strict=True), start=2):
        x = rewriter.call(aten.unfold.default, x, dim, gap * (extent - 1) + 1, step)
        if gap > 1:
            x = rewriter.call(aten.slice.Tensor, x, -1, 0, sys.maxsize, gap)
    dims = len(size)
    positions, inside = range(2, 2 + dims), range(2 + dims, 2 + 2 * dims)
    columns: fx.Node = rewriter.call(aten.permute.default, x, [0, *positions, 1, *inside])
    return columns


def _grouped(rewriter: Rewriter, columns: fx.Node, batch: Batch, bias: Any, dims: int) -> fx.Node:
    """The product of each group of channels with a matrix of its own."""
    groups = batch.window.size[0]
    around = [rewriter.size(columns, dim) for dim in range(1 + dims)]
    apart = rewriter.call(aten.unflatten.int, columns, 1 + dims, [groups, -1])
    first = rewriter.call(aten.movedim.int, apart, 1 + dims, 0)
    rows = rewriter.call(aten.flatten.using_ints, rewriter.call(aten.flatten.using_ints, first, 1, 1 + dims), 2)
    product = rewriter.batched(packed_batched_linear, rows, batch, None)
    together = rewriter.call(aten.flatten.using_ints, rewriter.call(aten.transpose.int, product, 0, 1), 1)
    if bias is not None:
        together = rewriter.call(aten.add.Tensor, together, bias)
    return _channels_second(rewriter, rewriter.call(aten.view.default, together, [*around, -1]), dims)


def _channels_second(rewriter: Rewriter, product: fx.Node, dims: int) -> fx.Node:
    """``[B, *positions, N]`` to ``[B, N, *positions]``."""
    return rewriter.permuted(product, (0, 1 + dims, *range(1, 1 + dims)))

"""Activations rounded to integers in front of a product, laid out as its tiles read them.

What they are rounded to is defined by :func:`kbit_inductor.kernels.reference.round_activations`: a step for at most 128 columns
that straddle no group, as on the CPU (ZeroQuant, Yao et al., 2022, rounds activations by row in the same place); or 8-bit floats
with a step for each row (Micikevicius et al., "FP8 Formats for Deep Learning", 2022). An RMS norm in front is computed by the same
kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kbit_inductor.kernels.layout import FP8
from kbit_inductor.kernels.reference import SEGMENT
from kbit_inductor.kernels.triton.norm import BLOCK as ROW_BLOCK
from kbit_inductor.kernels.triton.norm import Norm, inverse_rms
from kbit_inductor.kernels.words import WordLayout

BLOCK_SEGMENTS = 8  # of a program


@dataclass(frozen=True)
class Activations:
    """``x`` as a product's kernel reads it.

    Attributes:
        values: ``[M, K]`` of its own dtype; or rounded ones ``[M, padded_columns]``, with zeros where the layout has padding: int8,
            or 8-bit floats as they are or held by float16.
        step: of int8 values, float32 ``[spans, M]``; of 8-bit floats ``[M]``; None where they are not rounded.
        sums: of the values over each span: float32 ``[spans, M]``, of int8 times their step; None where the product sums by itself.
    """

    values: Tensor
    step: Tensor | None = None
    sums: Tensor | None = None


@triton.jit
def _to_nearest(x):
    """Float32 of magnitude below ``2 ** 22`` to integers, halves to even ones: added to 1.5 * 2 ** 23 they lose all else."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _to_nearest_fp8(x):
    """Float32 of magnitude up to 448 to numbers of e4m3, halves to even ones: 4 significant bits, steps of 2 ** -9 or more."""
    power = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    larger = tl.maximum(power, 2.0**-6) * (1.5 * 2.0**20)  # what is below its last digit is lost
    return (x + larger) - larger


@triton.jit
def _step_of_row(x_ptr, norm_ptr, inverse, K, BLOCK: tl.constexpr):
    """The step of 8-bit floats for the row at ``x_ptr``, float32; NaN where a value is not finite."""
    largest = tl.zeros([BLOCK], tl.float32)
    unknown = tl.zeros([BLOCK], tl.float32)
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)
        if norm_ptr is not None:
            x = x * inverse * tl.load(norm_ptr + k, mask=k < K, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(x))
        unknown += x * 0.0
    return tl.div_rn(tl.max(largest, 0), 448.0) + tl.sum(unknown, 0)


@triton.jit
def round_segments(x, there, BITS: tl.constexpr):
    """Each row of float32 ``x`` as integers of ``BITS``, still float32, and their step. What is not ``there`` is and stays 0."""
    unknown = tl.sum(x * 0.0, 1)  # NaN where one is not finite, which poisons the row and nothing else
    if BITS == 1:
        count = tl.maximum(tl.sum(there.to(tl.float32), 1), 1.0)
        step = tl.div_rn(tl.sum(tl.abs(x), 1), count)
        rounded = tl.where(there, tl.where(x < 0, -1.0, 1.0), 0.0)
    else:
        step = tl.div_rn(tl.max(tl.abs(x), 1), tl.full(unknown.shape, 2.0 ** (BITS - 1) - 1, tl.float32))
        # Of the smallest steps the inverse would be infinite.
        inverse = tl.where(step > 2.0**-126, tl.div_rn(tl.full(unknown.shape, 1.0, tl.float32), step), 0.0)
        rounded = _to_nearest(x * inverse[:, None])
    rounded = tl.where((unknown == 0)[:, None], rounded, 0.0)
    return rounded, step + unknown


@triton.jit(do_not_specialize=["M"])
def quantize_kernel(
    x_ptr, norm_ptr, values_ptr, step_ptr, sums_ptr, M, K, x_row_stride, segments, padded_columns,
    GROUP_SIZE: tl.constexpr, GROUP_WIDTH: tl.constexpr, GROUP_SEGMENTS: tl.constexpr, SEGMENT: tl.constexpr, SPAN: tl.constexpr,
    BITS: tl.constexpr, EPS: tl.constexpr, BLOCK_SEGMENTS: tl.constexpr, BLOCK: tl.constexpr, ROW_BLOCK: tl.constexpr,
):  # fmt: skip
    """Some segments of one row, of ``BLOCK`` columns or fewer; ``SPAN`` columns of the layout share a sum and, of int8, a step.

    What a norm or 8-bit floats need of the whole row every program of the row computes, from a cache, so that one launch does.
    """
    m = tl.program_id(0)
    row_ptr = x_ptr + m.to(tl.int64) * x_row_stride
    segment = tl.program_id(1) * BLOCK_SEGMENTS + tl.arange(0, BLOCK_SEGMENTS)
    group = segment // GROUP_SEGMENTS
    begin = segment % GROUP_SEGMENTS * SEGMENT
    column = begin[:, None] + tl.arange(0, BLOCK)[None, :]  # of a group
    k = group[:, None] * GROUP_SIZE + column
    there = (column < GROUP_SIZE) & (k < K) & (segment < segments)[:, None]
    x = tl.load(row_ptr + k, mask=there, other=0.0).to(tl.float32)
    inverse = 1.0
    if norm_ptr is not None:
        inverse = inverse_rms(row_ptr, K, EPS, ROW_BLOCK)
        x = x * inverse * tl.load(norm_ptr + k, mask=there, other=0.0).to(tl.float32)
    if BITS < 0:
        row_step = _step_of_row(row_ptr, norm_ptr, inverse, K, ROW_BLOCK)
        rounded = tl.where(row_step > 2.0**-126, _to_nearest_fp8(x * tl.div_rn(1.0, row_step)), 0.0)
        tl.store(step_ptr + m, row_step)
    else:
        rounded, step = round_segments(x, there, BITS)

    place = group[:, None] * GROUP_WIDTH + column
    kept = (column < GROUP_WIDTH) & (place < padded_columns) & (segment < segments)[:, None]
    tl.store(values_ptr + m.to(tl.int64) * padded_columns + place, rounded.to(values_ptr.dtype.element_ty), mask=kept)
    inside = tl.arange(0, BLOCK // SPAN)[None, :] * SPAN + begin[:, None]
    first = group[:, None] * GROUP_WIDTH + inside
    kept = (inside < GROUP_WIDTH) & (first < padded_columns) & (segment < segments)[:, None]
    sums = tl.sum(tl.reshape(rounded, [BLOCK_SEGMENTS, BLOCK // SPAN, SPAN]), 2)
    where = (first // SPAN).to(tl.int64) * M + m
    if BITS > 0:
        sums *= step[:, None]
        tl.store(step_ptr + where, tl.broadcast_to(step[:, None], sums.shape), mask=kept)
    tl.store(sums_ptr + where, sums, mask=kept)


def empty_activations(m: int, layout: WordLayout, span: int, device: torch.device, dtype: torch.dtype = torch.int8) -> Activations:
    """Room for ``m`` rounded rows: of int8 with a step for each ``span`` pieces, else of 8-bit floats, held by ``dtype``."""
    values = torch.empty(m, layout.padded_columns, dtype=dtype, device=device)
    step, sums = torch.empty(2, layout.pieces // span, m, dtype=torch.float32, device=device)
    if dtype != torch.int8:
        new = torch.empty if layout.padded_columns else torch.zeros  # that of a row without columns is read, too
        step = new(m, dtype=torch.float32, device=device)
    return Activations(values, step, sums)


def launch_arguments(
    x: Tensor, layout: WordLayout, span: int, bits: int, rounded: Activations, norm: Norm | None = None
) -> dict[str, object]:
    """Arguments of :func:`quantize_kernel`, by name; ``x`` is ``[M, K]`` with columns side by side."""
    width = layout.group_pieces * layout.piece
    segments = triton.cdiv(layout.group_size, SEGMENT)
    return {
        "x_ptr": x,
        "norm_ptr": None if norm is None else norm.weight,
        "values_ptr": rounded.values,
        "step_ptr": rounded.step,
        "sums_ptr": rounded.sums,
        "M": x.size(0),
        "K": x.size(1),
        "x_row_stride": x.stride(0),
        "segments": triton.cdiv(layout.pieces, layout.group_pieces) * segments,  # those of the padding at the end too
        "padded_columns": layout.padded_columns,
        "GROUP_SIZE": layout.group_size,
        "GROUP_WIDTH": width,
        "GROUP_SEGMENTS": segments,
        "SEGMENT": SEGMENT,
        "SPAN": span * layout.piece,
        "BITS": bits,
        "EPS": 0.0 if norm is None else norm.eps,
        "BLOCK_SEGMENTS": BLOCK_SEGMENTS,
        "BLOCK": triton.next_power_of_2(min(SEGMENT, width)),
        "ROW_BLOCK": ROW_BLOCK,
    }


def quantize(
    x: Tensor, layout: WordLayout, span: int, bits: int, norm: Norm | None = None, fp8: torch.dtype = torch.float16
) -> Activations:
    """``x`` ``[M, K]``, or its norm, rounded to ``bits``: integers below ``2 ** (bits - 1)``, or ±1 at 1 bit, or 8-bit floats.

    Args:
        x: float16, bfloat16 or float32, with columns side by side.
        layout: of the weight.
        span: pieces that share a step.
        bits: 1 to 8, or ``FP8``.
        norm: computed first, in float32.
        fp8: the dtype that holds 8-bit floats.

    A row with a NaN or an infinity gets a step of NaN there, so its products are NaN. Values below the normal floats are 0.
    """
    rounded = empty_activations(x.size(0), layout, span, x.device, fp8 if bits == FP8 else torch.int8)
    arguments = launch_arguments(x, layout, span, bits, rounded, norm)
    if rounded.values.numel():
        with torch.cuda.device_of(x):  # Triton launches on the current device, whatever device the tensors are on
            quantize_kernel[x.size(0), triton.cdiv(arguments["segments"], BLOCK_SEGMENTS)](**arguments)
    return rounded

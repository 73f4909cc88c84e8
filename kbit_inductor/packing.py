"""A float weight turned into the operands that kernels read."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from kbit_inductor._compat import no_modes
from kbit_inductor.config import LayerConfig
from kbit_inductor.errors import NonFiniteWeightError, UnsupportedDtypeError, UnsupportedShapeError
from kbit_inductor.kernels import reference
from kbit_inductor.kernels.layout import TILED_LAYOUTS, group_count, pack_codes, packed_width, tiled_nbytes
from kbit_inductor.kernels.words import WordLayout, pack_words, unpack_words
from kbit_inductor.quantizers import QUANTIZERS, Levels, Statistics

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Operands = tuple[Tensor, ...]
T = TypeVar("T")


@dataclass(frozen=True)
class PackedWeight:
    """A weight ``[N, K]``, or a batch of them ``[E, N, K]``, of k-bit codes.

    Attributes:
        operands: in the layout ``"planes"`` (``kbit_inductor.kernels.layout``) they are ``planes, scale, offset, global_scale,
            codebook``, without ``offset`` when the grid is symmetric and without ``codebook`` when every code is its own level; in
            the layout ``"words"`` of the GPU kernels (``kbit_inductor.kernels.words``) the same with ``words`` for ``planes`` and
            groups before rows; in the layouts ``"tiled"`` and ``"vectors"`` of the CPU kernels, one uint8 tensor. Those of a batch
            are the operands of its matrices, stacked.
        config: how it was quantized.
        columns: K.
        error: squared error over squared norm of the float weight.
        layout: ``"planes"``, ``"words"``, ``"tiled"`` or ``"vectors"``.
        batch: E, or None for one matrix.
    """

    operands: Operands
    config: LayerConfig
    columns: int
    error: float
    layout: str = "planes"
    batch: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all operands."""
        return sum(operand.nbytes for operand in self.operands)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The float weight, ``[N, K]`` or ``[E, N, K]``, that the codes stand for."""
        with no_modes():
            if self.batch is not None:
                matrices = zip(*self.operands, strict=True)
                return torch.stack([dataclasses.replace(self, operands=each, batch=None).dequantize(dtype) for each in matrices])
            if self.layout in TILED_LAYOUTS:
                codes, scale, zero, global_scale, levels = torch.ops.kbit.untile_cpu(self.operands[0])
                planes, offset = pack_codes(codes, self.config.bits), None if self.config.symmetric else zero
                codebook = levels if levels.numel() else None
            else:
                planes, scale, offset, global_scale, codebook = plane_operands(self.operands, self.config)
            group_size = self.config.group_columns(self.columns)
            if self.layout == "words":
                planes = pack_codes(unpack_words(planes, self.config.bits, self.columns, group_size), self.config.bits)
                scale, offset = scale.t(), None if offset is None else offset.t()
            return reference.dequantize(planes, scale, offset, global_scale, self.columns, group_size, dtype, codebook)


@torch.no_grad()
def pack(
    weight: Tensor, config: LayerConfig, layer: str = "weight", layout: str = "planes", statistics: Statistics | None = None
) -> PackedWeight:
    """Quantize and pack ``weight``, float32, bfloat16 or float16 of shape ``[N, K]`` or ``[E, N, K]`` and any strides.

    ``statistics`` are those of the inputs of a matrix; of a batch there are none, as its matrices see different rows.

    Raises:
        UnsupportedDtypeError: any other dtype.
        UnsupportedShapeError: any other number of dimensions, or a batch of no matrices.
        NonFiniteWeightError: the weight holds NaN or an infinity.
    """
    if weight.dtype not in WEIGHT_DTYPES:
        raise UnsupportedDtypeError(f"layer {layer!r} has a weight of {weight.dtype}; give float32, bfloat16 or float16")
    if weight.dim() not in (2, 3) or (weight.dim() == 3 and weight.size(0) == 0):
        raise UnsupportedShapeError(
            f"layer {layer!r} has a weight of shape {tuple(weight.shape)}; give a matrix [N, K], or [E, N, K] with E of 1 or more"
        )
    with no_modes():
        if not _is_finite(weight):
            bad = int(weight.numel() - torch.isfinite(weight).sum())
            raise NonFiniteWeightError(
                f"layer {layer!r} has a weight with {bad} values that are NaN or infinite; mend the checkpoint, or leave "
                f"the layer in float with skip=[{layer!r}]"
            )
        return _pack_matrix(weight, config, layout, statistics) if weight.dim() == 2 else _pack_batch(weight, config, layout)


def _pack_matrix(weight: Tensor, config: LayerConfig, layout: str, statistics: Statistics | None = None) -> PackedWeight:
    columns = weight.size(1)
    group_size = config.group_columns(columns)
    levels = config.levels()
    quantized = QUANTIZERS[config.quantizer].quantize(weight, config.format(columns), statistics)
    grid = (quantized.scale, quantized.offset, quantized.global_scale)
    codebook = Levels(config.bits, levels).table(weight.device)
    operands: Operands
    if layout in TILED_LAYOUTS:
        vectors = layout == "vectors"
        operands = (torch.ops.kbit.tile_cpu(quantized.codes, *grid, config.bits, group_size, codebook, vectors),)
    elif layout == "words":
        groups_first = [None if each is None else each.t().contiguous() for each in (quantized.scale, quantized.offset)]
        words = pack_words(quantized.codes, config.bits, group_size)
        operands = tuple(each for each in (words, *groups_first, quantized.global_scale, codebook) if each is not None)
    else:
        operands = (pack_codes(quantized.codes, config.bits), *(tensor for tensor in (*grid, codebook) if tensor is not None))
    return PackedWeight(operands, config, columns, quantized.error, layout)


def _pack_batch(weight: Tensor, config: LayerConfig, layout: str) -> PackedWeight:
    """One matrix after the other: each has a ``global_scale`` of its own, so small values lose nothing by large neighbours."""
    packed = [_pack_matrix(matrix, config, layout) for matrix in weight]
    stack = torch.ops.kbit.stack_cpu if layout == "tiled" else torch.stack
    operands = tuple(stack(list(each)) for each in zip(*(one.operands for one in packed), strict=True))
    norms = [float(matrix.float().square().sum(dtype=torch.float64)) for matrix in weight]
    lost = sum(one.error * norm for one, norm in zip(packed, norms, strict=True))
    return PackedWeight(operands, config, weight.size(2), lost / sum(norms) if lost else 0.0, layout, batch=len(packed))


def _is_finite(weight: Tensor) -> bool:
    """Whether all values are finite: the extremes carry any NaN or infinity, and need one pass."""
    return weight.numel() == 0 or bool(torch.isfinite(torch.stack(weight.aminmax())).all())


def plane_operands(operands: Sequence[T], config: LayerConfig) -> tuple[T, T, T | None, T, T | None]:
    """``planes, scale, offset, global_scale, codebook`` of the layout ``"planes"``, None for what ``config`` does without.

    In the layout ``"words"`` the words are in the place of planes.
    """
    rest = list(operands)
    codebook = rest.pop() if config.levels() else None
    planes, scale, *offset, global_scale = rest
    return planes, scale, offset[0] if offset else None, global_scale, codebook


def operand_specs(
    rows: int, columns: int, config: LayerConfig, layout: str, batch: int | None = None
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each operand that :func:`pack` will give, known before any value is."""
    group_size = config.group_columns(columns)
    stacked = () if batch is None else (batch,)
    if layout in TILED_LAYOUTS:
        has_codebook, vectors = bool(config.levels()), layout == "vectors"
        nbytes = tiled_nbytes(rows, columns, config.bits, group_size, config.symmetric, has_codebook, vectors)
        return [((*stacked, nbytes), torch.uint8)]
    groups = group_count(columns, group_size)
    if layout == "words":
        grid = ((*stacked, groups, rows), torch.float16)
        planes = ((*stacked, rows, WordLayout.of(config.bits, columns, group_size).row_words), torch.int16)
    else:
        grid = ((*stacked, rows, groups), torch.float16)
        planes = ((*stacked, config.bits, rows, packed_width(columns)), torch.uint8)
    codebook = [((*stacked, 2**config.bits), torch.uint8)] if config.levels() else []
    return [planes, grid, *([] if config.symmetric else [grid]), ((*stacked, 1), torch.float32), *codebook]

"""A float weight turned into the operands that kernels read."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from kbit_inductor import row_parts
from kbit_inductor._compat import no_modes
from kbit_inductor.config import LayerConfig
from kbit_inductor.errors import InvalidOptionError, NonFiniteWeightError, UnsupportedDtypeError, UnsupportedShapeError
from kbit_inductor.kernels import reference
from kbit_inductor.kernels.layout import TILED_LAYOUTS, group_count, pack_codes, packed_width, tiled_nbytes, unpack_codes
from kbit_inductor.kernels.words import WordLayout, pack_words, unpack_words
from kbit_inductor.quantizers import QUANTIZERS, Levels, Statistics, cascade
from kbit_inductor.quantizers.compensation import outlier_columns, without_columns
from kbit_inductor.quantizers.grid import global_scale_of, ratio
from kbit_inductor.quantizers.pruning import pruned
from kbit_inductor.quantizers.stretch import stretched
from kbit_inductor.side import Side, find_side, side_specs

STORED = ("planes", "scale", "offset", "global_scale", "codebook")
"""Names of the operands of the storage format."""
ROWS_OF_HEADER = slice(16, 24)  # bytes of the CPU kernels' layouts: int64, how many rows there are
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
        error: squared error over squared norm of the float weight; of a cascade, of all its bits.
        layout: ``"planes"``, ``"words"``, ``"tiled"`` or ``"vectors"``.
        batch: E, or None for one matrix.
        side: what floats add to the product of the codes, or None.
    """

    operands: Operands
    config: LayerConfig
    columns: int
    error: float
    layout: str = "planes"
    batch: int | None = None
    side: Side | None = None

    @property
    def inputs(self) -> Operands:
        """What a graph takes of it: the operands, and the parts of the side term."""
        return self.operands if self.side is None else (*self.operands, *self.side.parts.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all operands, and of the side term."""
        return sum(operand.nbytes for operand in self.inputs)

    @property
    def coded(self) -> PackedWeight:
        """The codes alone, without the side term."""
        return self if self.side is None else dataclasses.replace(self, side=None)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The float weight, ``[N, K]`` or ``[E, N, K]``, that the codes and the side term stand for."""
        with no_modes():
            if self.side is not None:
                wide = torch.promote_types(dtype, torch.float32)
                return (self.coded.dequantize(wide) + self.side.matrix(self.columns, wide)).to(dtype)
            if self.batch is not None:
                matrices = zip(*self.operands, strict=True)
                return torch.stack([dataclasses.replace(self, operands=each, batch=None).dequantize(dtype) for each in matrices])
            if self.config.cascade:
                return self.plain.dequantize(dtype)
            planes, scale, offset, global_scale, codebook = plane_operands(self.laid_out("planes").operands, self.config)
            group_size = self.config.group_columns(self.columns)
            return reference.dequantize(planes, scale, offset, global_scale, self.columns, group_size, dtype, codebook)

    @property
    def plain(self) -> PackedWeight:
        """This weight; of a cascade, that of all its planes, no cascade."""
        return dataclasses.replace(self.leading(self.config.bits), error=self.error) if self.config.cascade else self

    def leading(self, bits: int) -> PackedWeight:
        """The weight, no cascade, of the first ``bits`` planes of a cascade, in the layout ``"planes"``. Its error is not known.

        Raises:
            InvalidOptionError: the cascade has fewer planes.
        """
        if not 1 <= bits <= self.config.bits:
            raise InvalidOptionError(
                f"option 'bits' is {bits!r}; a cascade of {self.config.bits} planes has 1 to {self.config.bits}"
            )
        planes, scale, offset, global_scale = self.laid_out("planes").operands
        operands = (planes[:bits], scale[bits - 1], offset[bits - 1], global_scale)
        config = dataclasses.replace(self.config, bits=bits, cascade=False)
        return PackedWeight(operands, config, self.columns, math.nan)

    def laid_out(self, layout: str) -> PackedWeight:
        """The same matrix in ``layout``, bit for bit. Those of the CPU kernels need the compiled library."""
        if layout == self.layout:
            return self
        with no_modes():
            parts = ((part, self._rows(part)) for part in row_parts.parts(self.rows, self.columns))
            operands = _laid_out(parts, self.rows, self.columns, *self._whole(), self.config, layout)
            return dataclasses.replace(self, operands=operands, layout=layout)

    @property
    def rows(self) -> int:
        """N."""
        if self.layout in TILED_LAYOUTS:
            return int(self.operands[0][ROWS_OF_HEADER].view(torch.int64))
        return self.operands[0].size(-2)

    def _whole(self) -> tuple[Tensor, Tensor | None]:
        """What belongs to no row: global scale and codebook."""
        if self.layout in TILED_LAYOUTS:
            *_, global_scale, levels = torch.ops.kbit.untile_cpu(self.operands[0], 0, 0)
            return global_scale, levels if levels.numel() else None
        found = plane_operands(self.operands, self.config)
        return found[3], found[4]

    def _rows(self, part: slice) -> row_parts.Rows:
        """Codes and grids of some rows."""
        if self.layout in TILED_LAYOUTS:
            codes, scale, zero, *_ = torch.ops.kbit.untile_cpu(self.operands[0], part.start, part.stop)
            return row_parts.Rows(codes, scale, None if self.config.symmetric else zero)
        packed, scale, offset, *_ = plane_operands(self.operands, self.config)
        if self.layout == "words":
            codes = unpack_words(packed[part], self.config.bits, self.columns, self.config.group_columns(self.columns))
            grids = [grid[:, part].t().contiguous() for grid in (scale, offset) if grid is not None]
        else:
            codes = unpack_codes(packed[:, part], self.columns)
            grids = [grid[..., part, :] for grid in (scale, offset) if grid is not None]
        return row_parts.Rows(codes, grids[0], grids[1] if len(grids) > 1 else None)


@torch.no_grad()
def pack(
    weight: Tensor, config: LayerConfig, layer: str = "weight", layout: str = "planes", statistics: Statistics | None = None
) -> PackedWeight:
    """Quantize and pack ``weight``, float32, bfloat16 or float16 of shape ``[N, K]`` or ``[E, N, K]`` and any strides.

    ``statistics`` are those of the inputs of a matrix; of a batch there are none, as its matrices see different rows, and it has no
    side term.

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
        check_finite(weight, layer)
        if weight.dim() == 3:
            return _pack_batch(weight, config.without_side, layout)
        return _pack_with_side(weight, config, layout, statistics)


def _pack_with_side(weight: Tensor, config: LayerConfig, layout: str, statistics: Statistics | None) -> PackedWeight:
    """Codes, and what makes good what they lose."""
    rows, columns = weight.shape
    specs = side_specs(rows, columns, config, weight.dtype)
    if not specs:
        return _pack_matrix(weight, config, layout, statistics)
    held, kept, told = weight, None, statistics
    if "side_columns" in specs:
        (count,), _ = specs["side_columns"]
        kept = outlier_columns(weight, config.format(columns), count, statistics)
        held, told = without_columns(weight, kept, statistics)
    packed = _pack_matrix(held, config, layout, told)
    wide = weight.float()
    side = find_side(wide - packed.dequantize(), kept, config, weight.dtype, statistics)
    packed = dataclasses.replace(packed, side=side)
    unit = global_scale_of(weight)
    left, norm = (float((each / unit).square().sum(dtype=torch.float64)) for each in (wide - packed.dequantize(), wide))
    return dataclasses.replace(packed, error=ratio(left, norm))


def _pack_matrix(weight: Tensor, config: LayerConfig, layout: str, statistics: Statistics | None = None) -> PackedWeight:
    rows, columns = weight.shape
    parts = row_parts.parts(rows, columns)
    if config.cascade:
        nested = cascade(weight, config.format(columns), statistics)
        found, global_scale = row_parts.Rows(nested.codes, nested.scale, nested.offset), nested.global_scale
        codebook, error = None, nested.errors[-1]
    else:
        cut = 0.0
        if config.sparsity:
            whole, weight = weight, pruned(weight, config.sparsity, statistics)
            norm = float(whole.float().square().sum(dtype=torch.float64))
            cut = ratio(norm - float(weight.float().square().sum(dtype=torch.float64)), norm)
        quantizer, form = QUANTIZERS[config.quantizer], config.format(columns)
        quantized = quantizer.quantize(weight, form, statistics)
        if quantizer.shrinks:
            quantized = stretched(weight, quantized, form, statistics)
        found, global_scale = row_parts.Rows(quantized.codes, quantized.scale, quantized.offset), quantized.global_scale
        codebook = Levels(config.bits, config.levels()).table(weight.device)
        error = cut + (1 - cut) * quantized.error  # zeros stay zeros, so the two parts are of different entries
    operands = _laid_out(((part, found.of(part)) for part in parts), rows, columns, global_scale, codebook, config, layout)
    return PackedWeight(operands, config, columns, error, layout)


def _laid_out(
    parts: Iterable[tuple[slice, row_parts.Rows]],
    rows: int,
    columns: int,
    global_scale: Tensor,
    codebook: Tensor | None,
    config: LayerConfig,
    layout: str,
) -> Operands:
    """Operands in ``layout`` of a matrix, written part by part."""
    if layout in TILED_LAYOUTS:
        return (_tiled(parts, rows, columns, global_scale, codebook, config, layout),)
    pieces = ((part, _packed(found, global_scale, codebook, config, layout)) for part, found in parts)
    return tuple(row_parts.joined(pieces, operand_specs(rows, columns, config, layout)))


def _packed(rows: row_parts.Rows, global_scale: Tensor, codebook: Tensor | None, config: LayerConfig, layout: str) -> Operands:
    """Operands of some rows in the layout ``"planes"`` or ``"words"``."""
    codes, scale, offset = rows
    if layout == "words":
        packed = pack_words(codes, config.bits, config.group_columns(codes.size(1)))
        scale, offset = scale.t().contiguous(), None if offset is None else offset.t().contiguous()
    else:
        packed = pack_codes(codes, config.bits)
    return tuple(tensor for tensor in (packed, scale, offset, global_scale, codebook) if tensor is not None)


def _tiled(
    parts: Iterable[tuple[slice, row_parts.Rows]],
    rows: int,
    columns: int,
    global_scale: Tensor,
    codebook: Tensor | None,
    config: LayerConfig,
    layout: str,
) -> Tensor:
    """A weight in a layout of the CPU kernels, written part by part."""
    told = (config.bits, config.group_columns(columns), config.symmetric, codebook, layout == "vectors", config.cascade)
    packed: Tensor = torch.ops.kbit.empty_tiled_cpu(rows, columns, global_scale, *told)
    for part, found in parts:
        torch.ops.kbit.tile_rows_cpu(packed, part.start, *found)
    return packed


def _pack_batch(weight: Tensor, config: LayerConfig, layout: str) -> PackedWeight:
    """One matrix after the other: each has a ``global_scale`` of its own, so small values lose nothing by large neighbours."""
    packed = [_pack_matrix(matrix, config, layout) for matrix in weight]
    stack = torch.ops.kbit.stack_cpu if layout == "tiled" else torch.stack
    operands = tuple(stack(list(each)) for each in zip(*(one.operands for one in packed), strict=True))
    norms = [float(matrix.float().square().sum(dtype=torch.float64)) for matrix in weight]
    lost = sum(one.error * norm for one, norm in zip(packed, norms, strict=True))
    return PackedWeight(operands, config, weight.size(2), lost / sum(norms) if lost else 0.0, layout, batch=len(packed))


def check_finite(weight: Tensor, layer: str) -> None:
    """Raise NonFiniteWeightError where ``weight`` holds NaN or an infinity, which its extremes show in one pass."""
    if weight.numel() and not bool(torch.isfinite(torch.stack(weight.aminmax())).all()):
        bad = int(weight.numel() - torch.isfinite(weight).sum())
        raise NonFiniteWeightError(
            f"layer {layer!r} has a weight with {bad} values that are NaN or infinite; mend the checkpoint, or leave "
            f"the layer in float with skip=[{layer!r}]"
        )


def plane_operands(operands: Sequence[T], config: LayerConfig) -> tuple[T, T, T | None, T, T | None]:
    """``planes, scale, offset, global_scale, codebook`` of the layout ``"planes"``, None for what ``config`` does without.

    In the layout ``"words"`` the words are in the place of planes.
    """
    rest = list(operands)
    codebook = rest.pop() if config.levels() else None
    planes, scale, *offset, global_scale = rest
    return planes, scale, offset[0] if offset else None, global_scale, codebook


def specs_by_name(
    rows: int, columns: int, config: LayerConfig, dtype: torch.dtype = torch.float32, *, reordered: bool = False
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each operand of a matrix of ``dtype`` in the storage format, by the names of :data:`STORED`.

    Then come the parts of its side term, and last the ``order`` of the columns, where it is ``reordered``.
    """
    specs = plane_operands(operand_specs(rows, columns, config, "planes"), config)
    named = {name: spec for name, spec in zip(STORED, specs, strict=True) if spec is not None}
    named |= side_specs(rows, columns, config, dtype)
    return {**named, "order": ((columns,), torch.int32)} if reordered else named


def operand_specs(
    rows: int, columns: int, config: LayerConfig, layout: str, batch: int | None = None
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each operand that :func:`pack` will give, known before any value is."""
    group_size = config.group_columns(columns)
    stacked = () if batch is None else (batch,)
    if layout in TILED_LAYOUTS:
        has_codebook, vectors = bool(config.levels()), layout == "vectors"
        shape = (rows, columns, config.bits, group_size)
        nbytes = tiled_nbytes(*shape, config.symmetric, has_codebook, vectors, config.cascade)
        return [((*stacked, nbytes), torch.uint8)]
    groups = group_count(columns, group_size)
    if layout == "words":
        grid = ((*stacked, groups, rows), torch.float16)
        planes = ((*stacked, rows, WordLayout.of(config.bits, columns, group_size).row_words), torch.int16)
    else:
        precisions = (config.bits,) if config.cascade else ()
        grid = ((*stacked, *precisions, rows, groups), torch.float16)
        planes = ((*stacked, config.bits, rows, packed_width(columns)), torch.uint8)
    codebook = [((*stacked, 2**config.bits), torch.uint8)] if config.levels() else []
    return [planes, grid, *([] if config.symmetric else [grid]), ((*stacked, 1), torch.float32), *codebook]

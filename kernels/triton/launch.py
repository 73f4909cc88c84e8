"""What the launches of all kernels of products have in common."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kbit_inductor.kernels.layout import FP8, MAX_BITS, level_bits, midpoint
from kbit_inductor.kernels.triton.config import Config, Device, held_dtype
from kbit_inductor.kernels.triton.norm import Norm
from kbit_inductor.kernels.triton.quantize import Activations, quantize
from kbit_inductor.kernels.words import WordLayout, pad_groups


@dataclass(frozen=True)
class Matrix:
    """A packed weight ``[N, K]`` in words (:mod:`kbit_inductor.kernels.words`), each tensor contiguous.

    Attributes:
        words: int16 ``[N, row_words]``.
        scale, offset: float16 ``[G, N]``; no offset of a symmetric grid.
        global_scale: float32 ``[1]``, a power of two.
        codebook: uint8 ``[2 ** bits]``, or None where every code is its own level.
        bias: ``[N]`` of any floating dtype, or None.
    """

    words: Tensor
    scale: Tensor
    offset: Tensor | None
    global_scale: Tensor
    codebook: Tensor | None = None
    bias: Tensor | None = None

    @property
    def rows(self) -> int:
        """N."""
        return self.words.size(0)


DTYPES = (torch.float16, torch.bfloat16, torch.float32)
NOT_ROUNDED = 16  # activation_bits of activations as they are
LEAST_SHARED_MEMORY = 99 << 10  # that a program may have on NVIDIA's GPUs of compute capability 8.0 up, where torch does not tell


def check_activations(x: Tensor, bits: int, kernel: str) -> None:
    """Raise TypeError or ValueError where no kernel takes the dtype of ``x``, or rounds to so many bits."""
    if x.dtype not in DTYPES:
        raise TypeError(f"the Triton {kernel} kernel takes float16, bfloat16 or float32, not {x.dtype}")
    if not 1 <= bits <= MAX_BITS and bits not in (FP8, NOT_ROUNDED):
        raise ValueError(
            f"the Triton {kernel} kernel rounds activations to 1 to 8 bits, by {FP8} to 8-bit floats, or, by {NOT_ROUNDED}, not at "
            f"all, but not to {bits}"
        )


def flat_rows(x: Tensor) -> Tensor:
    """``x`` ``[..., K]`` as ``[M, K]`` with columns side by side, copied where its strides are others."""
    flat = x.reshape(math.prod(x.shape[:-1]), x.size(-1))
    return flat if flat.stride(1) == 1 else flat.contiguous()


def device_of(x: Tensor) -> Device:
    """What decides how products with ``x`` are cut."""
    if not x.is_cuda:
        return Device()
    properties = torch.cuda.get_device_properties(x.device)
    amd = torch.version.hip is not None
    shared = (
        properties.shared_memory_per_block if amd else getattr(properties, "shared_memory_per_block_optin", LEAST_SHARED_MEMORY)
    )
    wgmma, least_rows = not amd and properties.major == 9, 16 if amd else 8
    return Device(properties.multi_processor_count, wgmma, least_rows, shared, copies_words=not amd, takes_fp8=takes_fp8(x))


FP8_CAPABILITY = (8, 9)  # of NVIDIA's tensor cores that multiply e4m3; AMD's of gfx942 have another form of it


def takes_fp8(x: Tensor) -> bool:
    """Whether tensor cores multiply 8-bit floats where ``x`` is."""
    return takes_ptx(x) and torch.cuda.get_device_capability(x.device) >= FP8_CAPABILITY


def takes_ptx(x: Tensor) -> bool:
    """Whether kernels for ``x`` may hold PTX."""
    return x.is_cuda and torch.version.hip is None


def span_sums(x: Tensor, layout: WordLayout, span: int) -> Tensor:
    """Sums of ``x`` ``[M, K]`` over each ``span`` pieces, float32 ``[spans, M]``."""
    spans = pad_groups(x, layout).view(x.size(0), -1, span * layout.piece)
    sums = torch.empty(spans.size(1), x.size(0), dtype=torch.float32, device=x.device)
    torch.sum(spans, -1, dtype=torch.float32, out=sums.t())  # one launch
    return sums


def span_pieces(layout: WordLayout, config: Config) -> int:
    """Pieces, 1 or 2, whose products are added up before their scale is applied."""
    return math.gcd(layout.group_pieces, config.steps, 2)


def operand_dtype(x: Tensor, bits: int) -> torch.dtype:
    """As what a product is cut whose ``x`` is rounded to ``bits``, or not at all."""
    return {NOT_ROUNDED: x.dtype, FP8: torch.float8_e4m3fn}.get(bits, torch.int8)


def activations(x: Tensor, layout: WordLayout, config: Config, bits: int, norm: Norm | None = None) -> Activations:
    """``x`` ``[..., K]`` as a product cut by ``config`` reads it: rounded to ``bits``, or not at all if they are 16.

    A ``norm`` is computed first, by the kernel that rounds.
    """
    flat, span = flat_rows(x), span_pieces(layout, config)
    if bits < NOT_ROUNDED:
        return quantize(flat, layout, span, bits, norm, held_dtype(torch.float8_e4m3fn, config, layout.bits, takes_fp8(x)))
    return Activations(flat, sums=span_sums(flat, layout, span) if config.sums else None)


def tile_arguments(x: Activations, layout: WordLayout, groups: int, codebook: bool, config: Config, ptx: bool) -> dict[str, object]:
    """Arguments of every kernel that calls :func:`~kbit_inductor.kernels.triton.tile.tile_sums`, by name, but for the weight.

    They say how it is compiled too. The weight has ``groups`` in a row, and may have a codebook.
    """
    padded = x.step is not None
    return {
        "x_ptr": x.values,
        "step_ptr": x.step,
        "sums_ptr": x.sums,
        "M": x.values.size(0),
        "K": x.values.size(1),
        "x_row_stride": x.values.stride(0),
        "row_words": layout.row_words,
        "groups": groups,
        "steps": layout.pieces // config.steps,
        "BITS": layout.bits,
        "MIDPOINT": midpoint(level_bits(layout.bits, codebook)),
        "GROUP_SIZE": layout.group_pieces * layout.piece if padded else layout.group_size,
        "PIECE": layout.piece,
        "GROUP_PIECES": layout.group_pieces,
        "BLOCK_PIECES": layout.block_pieces,
        "BLOCK_TILES": layout.block_tiles,
        "STEPS": config.steps,
        "SPAN": span_pieces(layout, config),
        "BLOCK_N": config.block_n,
        "BLOCK_M": config.block_m,
        "EVEN_K": layout.padded_columns == x.values.size(1),
        "PTX": ptx,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }

"""What the launches of all kernels of products have in common."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kbit_inductor.kernels.layout import level_bits, midpoint
from kbit_inductor.kernels.triton.config import Config, Device
from kbit_inductor.kernels.words import WordLayout, pad_groups

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def check_dtype(x: Tensor, kernel: str) -> None:
    """Raise TypeError where no kernel takes the dtype of ``x``."""
    if x.dtype not in DTYPES:
        raise TypeError(f"the Triton {kernel} kernel takes float16, bfloat16 or float32, not {x.dtype}")


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
    return Device(properties.multi_processor_count, wgmma=not amd and properties.major == 9, least_rows=16 if amd else 8)


def takes_ptx(x: Tensor) -> bool:
    """Whether kernels for ``x`` may hold PTX."""
    return x.is_cuda and torch.version.hip is None


def span_sums(x: Tensor, layout: WordLayout, span: int) -> Tensor:
    """Sums of ``x`` ``[M, K]`` over each ``span`` pieces, float32 ``[spans, M]``."""
    padded = pad_groups(x, layout)
    return padded.view(x.size(0), -1, span * layout.piece).sum(-1, dtype=torch.float32).t().contiguous()


def tile_arguments(
    x: Tensor, words: Tensor, scale: Tensor, offset: Tensor | None, global_scale: Tensor, bits: int, group_size: int,
    codebook: Tensor | None, config: Config, ptx: bool,
) -> dict[str, object]:  # fmt: skip
    """Arguments by name of every kernel that calls :func:`~kbit_inductor.kernels.triton.tile.tile_sums`, and how it is compiled.

    ``x`` is ``[M, K]`` with columns side by side; the operands are those of a matrix, or of a batch of them.
    """
    (m, k), n = x.shape, words.size(-2)
    layout = WordLayout.of(bits, k, group_size)
    span = math.gcd(layout.group_pieces, config.steps, 2)
    return {
        "x_ptr": x,
        "words_ptr": words,
        "scale_ptr": scale,
        "offset_ptr": offset,
        "global_scale_ptr": global_scale,
        "codebook_ptr": codebook,
        "sums_ptr": span_sums(x, layout, span) if config.sums else None,
        "M": m,
        "N": n,
        "K": k,
        "x_row_stride": x.stride(0),
        "row_words": layout.row_words,
        "groups": scale.size(-2),
        "steps": layout.pieces // config.steps,
        "BITS": bits,
        "MIDPOINT": midpoint(level_bits(bits, codebook is not None)),
        "GROUP_SIZE": layout.group_size,
        "PIECE": layout.piece,
        "GROUP_PIECES": layout.group_pieces,
        "BLOCK_PIECES": layout.block_pieces,
        "BLOCK_TILES": layout.block_tiles,
        "STEPS": config.steps,
        "SPAN": span,
        "BLOCK_N": config.block_n,
        "BLOCK_M": config.block_m,
        "EVEN_N": n % config.block_n == 0,
        "EVEN_K": layout.padded_columns == k,
        "PTX": ptx,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }

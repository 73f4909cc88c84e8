"""What a kernel is asked to compute."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Problem:
    """One product or look-up to be computed.

    Attributes:
        family: ``"linear"`` or ``"embedding"``; ``"batched_linear"`` or ``"grouped_linear"`` for a batch of matrices.
        device: type of the device, ``"cpu"`` or ``"cuda"``.
        dtype: of the activations, or of the looked-up rows.
        rows: N, output features or entries of the table; of one matrix of a batch.
        columns: K, input features or width of an entry.
        bits: bits per code.
        group_size: columns per scale.
        uniform: whether every code is its own level, so that there is no codebook.
        activation_bits: what kernels round activations to, 1 to 8, ``FP8`` for 8-bit floats, or 16: not rounded.
        symmetric: whether there is no offset.
        device_index: which of the devices of its type.
        cascade: whether the first planes of the codes are to be read alone.
        matrices: E, of a batch; else 1.
    """

    family: str
    device: str
    dtype: torch.dtype
    rows: int
    columns: int
    bits: int
    group_size: int
    uniform: bool = True
    activation_bits: int = 16
    symmetric: bool = False
    device_index: int = 0
    cascade: bool = False
    matrices: int = 1

    @property
    def packed_bytes(self) -> float:
        """Bytes of codes, scales and offsets."""
        return self.rows * self.columns * (self.bits / 8 + 4 / self.group_size)

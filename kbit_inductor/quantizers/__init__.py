"""Quantizers: weights in, codes out. They know neither graphs nor kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from torch import Tensor

from kbit_inductor.quantizers.clip import clip
from kbit_inductor.quantizers.codebooks import CODEBOOK_NAMES, Codebook, codebook
from kbit_inductor.quantizers.grid import Quantized
from kbit_inductor.quantizers.levels import Levels
from kbit_inductor.quantizers.rtn import rtn

Quantizer = Callable[[Tensor, int, int, bool, "Codebook | None"], Quantized]
"""``(weight [N, K], bits, group_size, symmetric, codebook) -> Quantized``; ``group_size`` is in columns, at least 1."""

QUANTIZERS: Mapping[str, Quantizer] = MappingProxyType({"clip": clip, "rtn": rtn})

__all__ = ["CODEBOOK_NAMES", "QUANTIZERS", "Codebook", "Levels", "Quantized", "Quantizer", "clip", "codebook", "rtn"]

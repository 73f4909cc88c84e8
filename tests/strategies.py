"""hypothesis strategies that several test files draw from."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

BITS = st.integers(1, 8)
GROUPS = st.one_of(st.sampled_from([1, 8, 16, 32, 64, 128]), st.integers(1, 200))
FLOATS = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
SEEDS = st.integers(0, 2**31 - 1)


def normal(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Gaussian values that depend on ``seed`` only."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)

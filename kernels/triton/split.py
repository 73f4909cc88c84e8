"""Sums whose columns are split over programs: the last to arrive adds them up in order, so that no sum depends on who it is."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def store_and_arrive(
    partial_ptr, arrivals_ptr, first, second, tile, share, SPLIT_K: tl.constexpr, PARTS: tl.constexpr, SIZE: tl.constexpr, inside
):
    """Store a share of ``PARTS`` sums; where they begin, and whether all others are there."""
    shares = partial_ptr + tile.to(tl.int64) * (SPLIT_K * PARTS * SIZE) + inside
    tl.store(shares + share * (PARTS * SIZE), first, cache_modifier=".cg")
    if PARTS == 2:
        tl.store(shares + (share * PARTS + 1) * SIZE, second, cache_modifier=".cg")
    tl.debug_barrier()  # what all threads stored is there before one of them says so
    is_last = tl.atomic_add(arrivals_ptr + tile, 1, sem="acq_rel") == SPLIT_K - 1
    tl.debug_barrier()
    return shares, is_last


@triton.jit
def add_up(shares, SPLIT_K: tl.constexpr, STRIDE: tl.constexpr):
    """The sum of the shares of one part, ``STRIDE`` apart."""
    total = tl.load(shares, cache_modifier=".cg")
    for other in range(1, SPLIT_K):
        total += tl.load(shares + other * STRIDE, cache_modifier=".cg")
    return total

"""How a product is cut into programs."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch

from kbit_inductor.kernels.words import WORD_BITS, WordLayout

DECODE_ROWS = 16
"""Rows of x up to which a program reads every word once and takes the sums of x from the tensor cores."""
FLOAT_ROWS = 2048
"""Rows of a 16-bit x from which the weight is unpacked once, for PyTorch's product. To write 8192 x 8192 floats, 128 MiB, takes an
H200 about 44 us; its tensor cores take 350 us for so many rows at full rate, which unpacking keeps it from."""
TWO_SUMS = (torch.bfloat16,)  # of which long codes are two, so that registers hold less
FP8_BITS = 4
"""Of a code that is an 8-bit float; a longer one is two, so that float16, of which it is one, takes no longer."""
PROGRAMS_PER_MULTIPROCESSOR = 4  # of two warps, in front of few rows
WARPS_PER_MULTIPROCESSOR = 8
MOST_SHARES = 16  # of a tile, which one program adds up
LEAST_BLOCK_N, LEAST_BLOCK_M = 32, 16
LEAST_STEPS = 4  # of a program, so that its pipeline fills
LEAST_STAGES = 2
RESULT_BYTES = 2  # of each sum of a tile, on its way to where it is stored
BARRIERS = 16  # bytes of shared memory, by which NVIDIA's pipelines wait


@dataclass(frozen=True)
class Config:
    """A program computes ``block_m`` rows of x by ``block_n`` rows of the weight, both powers of two.

    Attributes:
        block_m: rows of x.
        block_n: rows of the weight.
        steps: pieces of a step: as many as a block has, so that every word is loaded once, or 2.
        sums: whether the sums of x are computed beforehand, as those of a rounded x are. Else tensor cores compute them too.
        split_k: programs that share a tile, each a part of the columns.
        num_warps: of a program.
        num_stages: loads of how many steps are under way.
    """

    block_m: int
    block_n: int
    steps: int
    sums: bool = False
    split_k: int = 1
    num_warps: int = 4
    num_stages: int = 3


@dataclass(frozen=True)
class Device:
    """What of a GPU decides how a product is cut.

    Attributes:
        multiprocessors: how many it has.
        wgmma: whether a group of four warps multiplies together (Hopper), so that registers hold larger tiles.
        least_rows: rows of x that an instruction of its tensor cores takes at least.
        shared_memory: bytes that a program may have.
        copies_words: whether words of a loop that is not unrolled go through shared memory (NVIDIA), or to registers (AMD).
        takes_fp8: whether its tensor cores multiply 8-bit floats (e4m3).
    """

    multiprocessors: int = 1
    wgmma: bool = False
    least_rows: int = 8
    shared_memory: int = 1 << 30
    copies_words: bool = True
    takes_fp8: bool = False


def default_config(m: int, n: int, layout: WordLayout, dtype: torch.dtype, device: Device) -> Config:
    """The config for ``m`` rows of x of ``dtype``, int8 or float8_e4m3fn if they are rounded, and ``n`` of the weight.

    By the kernel's instructions and resources, not by measurement. Of so many stages as the shared memory holds.
    """
    config = _wanted(m, n, layout, dtype, device)
    while config.num_stages > LEAST_STAGES and shared_bytes(config, layout, dtype, device) > device.shared_memory:
        config = dataclasses.replace(config, num_stages=config.num_stages - 1)
    return config


def held_dtype(dtype: torch.dtype, config: Config, bits: int, takes_fp8: bool) -> torch.dtype:
    """What holds an x of ``dtype``: float16 8-bit floats, but for tensor cores that take them, many rows, and short codes.

    For few rows, compilers make float16 of 8-bit floats in front of each product (``mma.sync`` on sm_90 and sm_100), and a code
    becomes a float16 by half as many instructions.
    """
    if dtype != torch.float8_e4m3fn or (takes_fp8 and config.block_m > DECODE_ROWS and bits <= FP8_BITS):
        return dtype
    return torch.float16


def shared_bytes(config: Config, layout: WordLayout, dtype: torch.dtype, device: Device) -> int:
    """Shared memory of a program, or a little more: what Triton's pipeline keeps of x and of the words, as it compiles.

    Steps that are asked for, one fewer than stages; where words are at an address that is computed, x is asked for one step
    earlier, and of ``wgmma`` the unpacked weight goes through shared memory too. If a block is unrolled, it is ``wgmma`` that keeps
    the x of one more step.
    """
    unrolled = config.steps == layout.block_pieces
    tile = config.block_n * layout.piece * WORD_BITS // 8
    held = held_dtype(dtype, config, layout.bits, device.takes_fp8)
    x = config.steps * config.block_m * layout.piece * held.itemsize
    tiles = layout.block_tiles if unrolled else config.steps * layout.bits.bit_count()
    words = tile * tiles if unrolled or device.copies_words else 0
    together = device.wgmma and config.num_warps >= 4 and config.block_n >= 64
    more = (0 if unrolled and not together else x) + (tile if together and not unrolled else 0)
    loop = (config.num_stages - 1) * (x + words) + more + (BARRIERS if device.copies_words else 0)
    return max(loop, config.block_m * config.block_n * RESULT_BYTES)


def _wanted(m: int, n: int, layout: WordLayout, dtype: torch.dtype, device: Device) -> Config:
    """That of :func:`default_config` where there is shared memory enough."""
    if m > DECODE_ROWS:
        return _filling(_tile(m, dtype, device), m, n, layout, device)
    if dtype == torch.float32:  # three products for each: unrolled, they would not fit in the registers
        return Config(16, 32, 2, num_warps=2)
    wanted = device.multiprocessors * PROGRAMS_PER_MULTIPROCESSOR // max(1, math.ceil(n / 32))
    split_k = max(1, min(wanted, layout.pieces // layout.block_pieces // LEAST_STEPS))
    if m > 8 and layout.bits % 2 and dtype != torch.int8:
        return _sixteen_rows(layout, split_k, dtype, device)
    return Config(device.least_rows if m <= 8 else 16, 32, layout.block_pieces, split_k=split_k, num_warps=2, num_stages=2)


def _tile(m: int, dtype: torch.dtype, device: Device) -> Config:
    """For more rows of x than are decoded: the more, the larger."""
    if m <= 32 or dtype == torch.float32:
        return Config(32, 64, 2, sums=True)
    if m <= 64 or not device.wgmma or dtype in TWO_SUMS:
        return Config(64, 128, 2, sums=True, num_warps=8)
    return Config(128, 128, 2, sums=True, num_warps=8)


def _filling(config: Config, m: int, n: int, layout: WordLayout, device: Device) -> Config:
    """``config`` with so many programs to a tile as give each multiprocessor :data:`WARPS_PER_MULTIPROCESSOR`."""
    tiles = max(1, math.ceil(m / config.block_m) * math.ceil(n / config.block_n))
    wanted = device.multiprocessors * WARPS_PER_MULTIPROCESSOR // (config.num_warps * tiles)
    return dataclasses.replace(config, split_k=max(1, min(wanted, layout.pieces // config.steps // LEAST_STEPS, MOST_SHARES)))


def _sixteen_rows(layout: WordLayout, split_k: int, dtype: torch.dtype, device: Device) -> Config:
    """For 9 to 16 rows and blocks of 16 pieces, as odd k have: so cut that registers suffice, as it was compiled."""
    if layout.bits in (3, 5) and device.wgmma:
        return Config(16, 64, layout.block_pieces, sums=True, split_k=split_k, num_warps=4, num_stages=2)
    config = Config(16, 32, layout.block_pieces, sums=True, split_k=split_k, num_warps=2, num_stages=2)
    if layout.bits == 1 and 3 * shared_bytes(config, layout, dtype, device) > device.shared_memory:
        return dataclasses.replace(config, block_n=64, num_warps=4)  # with room for two programs at most
    longer = dataclasses.replace(config, num_stages=3)
    if layout.bits == 3 and 2 * shared_bytes(longer, layout, dtype, device) <= device.shared_memory:
        return longer  # with room for a second program
    return config


def smaller(config: Config) -> Config | None:
    """The next configuration that takes less shared memory and fewer registers: fewer loads under way, then smaller tiles."""
    if config.num_stages > 1:
        return dataclasses.replace(config, num_stages=config.num_stages - 1)
    if config.block_n > LEAST_BLOCK_N:
        return dataclasses.replace(config, block_n=config.block_n // 2)
    if config.block_m > LEAST_BLOCK_M:
        return dataclasses.replace(config, block_m=config.block_m // 2)
    return None

"""What it costs to fuse bias, activation, factor and residual sum into a product: with and without, on the same layers."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from gpu.contenders import GROUP
from gpu.layers import COLDER, LEAST, MOST
from gpu.machine import l2_bytes
from gpu.session import Row, Session
from kbit_inductor import LayerConfig
from kbit_inductor.packing import pack, plane_operands

SHAPES = ((8192, 8192), (14336, 4096))
INPUTS = (1, 16, 256)
BITS = (4, 2)


def measure(session: Session) -> None:
    """Rows with the seconds of the plain and of the fused product."""
    for shape in ((64, 256),) if session.rehearsal else SHAPES:
        for bits in BITS:
            for inputs in (1, 4) if session.rehearsal else INPUTS:
                what: Row = {"n": shape[0], "k": shape[1], "m": inputs, "bits": bits}
                with session.row(what) as there_is_time:
                    if there_is_time:
                        session.say(f"fused epilogue: {shape[0]}×{shape[1]}, {inputs} rows of x, {bits} bits")
                        session.add(what | _both(session, shape, bits, inputs))


def _both(session: Session, shape: tuple[int, int], bits: int, inputs: int) -> Row:
    (rows, columns), device, half = shape, session.device, torch.float16
    config = LayerConfig(bits=bits, group_size=GROUP, quantizer="rtn")
    packed = pack(torch.randn(rows, columns, dtype=half, device=device), config, layout="words")
    copies = _copies(packed.operands, max(2 if session.rehearsal else LEAST, math.ceil(COLDER * l2_bytes(device) / packed.nbytes)))
    x, bias = torch.randn(inputs, columns, dtype=half, device=device), torch.randn(rows, dtype=half, device=device)
    factor, residual = (torch.randn(inputs, rows, dtype=half, device=device) for _ in range(2))
    plain, fused = [], []
    for operands in copies:
        *product, codebook = plane_operands(operands, config)
        told = (bits, GROUP, codebook)
        plain.append(functools.partial(torch.ops.kbit.linear_triton.default, x, *product, None, *told))
        words, scale, offset, one = ([] if operand is None else [operand] for operand in product)
        behind = (bits, GROUP, "silu", False, factor, residual, 16)
        call = torch.ops.kbit.fused_linear_triton.default
        fused.append(functools.partial(call, x, None, 0.0, words, scale, offset, one, [bias], [], *behind))
    seconds = {"plain_seconds": session.clock.seconds(plain), "fused_seconds": session.clock.seconds(fused)}
    return {**seconds, "cost": seconds["fused_seconds"] / seconds["plain_seconds"] - 1}


def _copies(operands: tuple[Tensor, ...], count: int) -> list[Any]:
    return [tuple(operand.clone() for operand in operands) for _ in range(min(count, MOST))]

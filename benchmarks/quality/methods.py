"""The methods that are compared: each turns a matrix into the one that its codes stand for, and tells the bytes of them."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from cpu import ggml
from torch import Tensor

from kbit_inductor import Config, LayerConfig
from kbit_inductor.packing import pack
from kbit_inductor.quantizers import QUANTIZERS, Statistics
from kbit_inductor.quantizers.codebooks import as_text
from kbit_inductor.quantizers.kmeans import learn_levels
from kbit_inductor.quantizers.registry import LEARNING

Rounded = tuple[Tensor, int]
"""The values ``[N, K]`` that are left of a matrix, and the bytes of what is stored."""


@dataclass(frozen=True)
class Method:
    """A way to round a matrix.

    Attributes:
        family: whose it is; one line of the picture.
        name: with its parameters.
        apply: ``(weight, statistics of its inputs) -> Rounded``.
        package: that must be importable.
        at_ends: as ``apply``, of tables and heads; None where they are as other matrices.
        options: to calibrate with, where the method learns codes of its own.
        text: that it is calibrated on: another one than is predicted (``"other"``), the model's ``"own"``, or ``"random"`` tokens.
    """

    family: str
    name: str
    apply: Callable[[Tensor, Statistics | None], Rounded]
    package: str = "kbit_inductor"
    at_ends: Callable[[Tensor, Statistics | None], Rounded] | None = None
    options: Mapping[str, Any] | None = None
    text: str = "other"

    def reason_missing(self) -> str | None:
        """Why it cannot be measured here, or None."""
        parents = itertools.accumulate(self.package.split("."), "{}.{}".format)
        return None if all(importlib.util.find_spec(each) for each in parents) else f"{self.package} is not installed"


def ours(config: LayerConfig, calibrated: bool, weight: Tensor, statistics: Statistics | None) -> Rounded:
    """Packed by this library."""
    packed = pack(weight, config, statistics=statistics if calibrated else None)
    return packed.dequantize(), packed.nbytes


def with_floor(label: str, bits: int, calibrated: bool, text: str = "other", **options: Any) -> Method:
    """Ours as :func:`kbit_inductor.quantize_` has it: tables and heads at no fewer than ``end_bits``."""
    config = Config(bits=bits, **options)
    layer, end = config.for_layer("layer"), config.for_layer("end", is_end=True)
    if layer is None or end is None:
        raise LookupError("a config without skip skips nothing")
    learns = {"bits": bits, **options} if QUANTIZERS[config.quantizer].needs in LEARNING else None
    groups = "" if config.group_size == 64 else f", groups of {config.group_size}"
    rounding = functools.partial(ours, layer, calibrated)
    at_ends = functools.partial(ours, end, calibrated)
    return Method(f"kbit {label}", f"{bits} bits{groups}", rounding, at_ends=at_ends, options=learns, text=text)


def with_levels(config: LayerConfig, weight: Tensor, statistics: Statistics | None) -> Rounded:
    """Packed by this library, with levels learned for this weight."""
    levels = learn_levels(weight, config.format(weight.size(1)), statistics)
    return ours(config if levels is None else dataclasses.replace(config, codebook=as_text(levels)), True, weight, statistics)


def hqq(bits: int, group_size: int, weight: Tensor, statistics: Statistics | None) -> Rounded:
    """HQQ's own quantizer at its defaults; scales and zero points count as float16."""
    from hqq.core.quantize import Quantizer

    codes, meta = Quantizer.quantize(weight, nbits=bits, group_size=group_size, axis=1, device="cpu", compute_dtype=torch.float32)
    grids = 2 * (meta["scale"].numel() + meta["zero"].numel())
    return Quantizer.dequantize(codes, meta), codes.nbytes + grids


def torchao(bits: int, group_size: int, weight: Tensor, statistics: Statistics | None) -> Rounded:
    """torchao's affine codes, as its weight-only uintx and int4 have them: a scale and a zero point of 16 bits per group."""
    from torchao.quantization import quant_primitives as primitives

    block, last = (1, group_size), 2**bits - 1
    mapping = primitives.MappingType.ASYMMETRIC
    scale, zero = primitives.choose_qparams_affine(weight, mapping, block, torch.uint8, 0, last, eps=1e-6)
    codes = primitives.quantize_affine(weight, block, scale, zero, torch.uint8, 0, last)
    values = primitives.dequantize_affine(codes, block, scale.half().float(), zero, torch.uint8, 0, last)
    return values, -(-codes.numel() * bits // 8) + 2 * (scale.numel() + zero.numel())


def quanto(bits: int, group_size: int, weight: Tensor, statistics: Statistics | None) -> Rounded:
    """optimum-quanto's codes, from end to end of a group; its scales and shifts count as float16."""
    from optimum.quanto import MaxOptimizer, qint2, qint4
    from optimum.quanto.tensor.grouped import ungroup

    grids = MaxOptimizer()(weight, {2: qint2, 4: qint4}[bits], axis=0, group_size=group_size)
    scale, shift = (grid.half().float() for grid in grids)
    codes = torch.ops.quanto.quantize_affine(weight, bits, 0, group_size, scale, shift)
    values = ungroup(codes * scale - shift, axis=0, orig_shape=weight.shape)
    return values, codes.numel() * bits // 8 + 2 * (scale.numel() + shift.numel())


def nf4(double: bool, weight: Tensor, statistics: Statistics | None) -> Rounded:
    """NF4 of bitsandbytes; ``double`` stores its scales in 8 bits, as QLoRA does."""
    from bitsandbytes import functional

    codes, state = functional.quantize_4bit(weight.float(), blocksize=64, quant_type="nf4", compress_statistics=double)
    scales = state.absmax.nbytes + (state.state2.absmax.nbytes if double else 0)
    return functional.dequantize_4bit(codes, state).to(weight.dtype), codes.nbytes + scales


# What llama.cpp takes where rows are no multiple of 256.
FALLBACKS = {"q6_K": "q8_0", "q5_K": "q5_1", "q4_K": "q5_0", "q3_K": "q4_0", "q2_K": "q4_0"}


def llama_cpp(kind: str, calibrated: bool, weight: Tensor, statistics: Statistics | None) -> Rounded:
    """A type of llama.cpp, with an importance matrix or without."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    library = ggml.library()
    rows, columns = weight.shape
    number = GGMLQuantizationType[kind.upper()]
    if columns % library.blck_size(number):
        return llama_cpp(FALLBACKS[kind], calibrated, weight, statistics)
    blocks = np.empty((rows, library.row_size(number, columns)), np.uint8)
    source = weight.float().contiguous()
    importance = statistics.mean_square.contiguous() if calibrated and statistics is not None else None
    pointer = None if importance is None else importance.data_ptr()
    library.quantize_chunk(number, source.data_ptr(), blocks.ctypes.data, 0, rows, columns, pointer)
    return torch.from_numpy(dequantize(blocks, number).copy()), blocks.nbytes


def methods() -> list[Method]:
    """All of them."""
    found = []
    for bits in range(2, 9):
        for label, quantizer, codebook, calibrated in (
            ("rtn", "rtn", "uniform", False),
            ("clip", "clip", "uniform", False),
            ("clip, calibrated", "clip", "uniform", True),
            ("gptq", "gptq", "uniform", True),
            ("gptq, normal", "gptq", "normal", True),
        ):
            config = LayerConfig(bits, 64, quantizer=quantizer, codebook=codebook)
            found.append(Method(f"kbit {label}", f"{bits} bits", functools.partial(ours, config, calibrated)))
    for bits in range(2, 7):
        found.append(with_floor("default", bits, False))
    for group_size in (64, 32):
        for bits in (2, 3, 4):
            found.append(with_floor("gptq with floor", bits, True, quantizer="gptq", group_size=group_size))
            found.append(with_floor("gptq on own text", bits, True, text="own", quantizer="gptq", group_size=group_size))
            found.append(with_floor("gptq on random tokens", bits, True, text="random", quantizer="gptq", group_size=group_size))
            found.append(with_floor("distill on own text", bits, True, text="own", quantizer="distill", group_size=group_size))
            plain = with_floor("gptq, learned levels, on own text", bits, True, text="own", quantizer="gptq", group_size=group_size)
            rounding = functools.partial(with_levels, LayerConfig(bits, group_size, quantizer="gptq"))
            found.append(dataclasses.replace(plain, apply=rounding))
            found.append(with_floor("autoround with floor", bits, True, quantizer="autoround", group_size=group_size))
    for bits in (2, 3, 4, 8):
        found.append(Method("HQQ", f"{bits} bits", functools.partial(hqq, bits, 64), "hqq"))
    for bits in range(2, 9):
        found.append(Method("torchao", f"{bits} bits", functools.partial(torchao, bits, 64), "torchao"))
    for bits in (2, 4):
        found.append(Method("quanto", f"{bits} bits", functools.partial(quanto, bits, 64), "optimum.quanto"))
    for double in (False, True):
        name = "NF4, double" if double else "NF4"
        found.append(Method("bitsandbytes", name, functools.partial(nf4, double), "bitsandbytes"))
    for label, calibrated, text in (
        ("llama.cpp", False, "other"),
        ("llama.cpp, imatrix", True, "other"),
        ("llama.cpp, imatrix of own text", True, "own"),
    ):
        for kind in ("q2_K", "q3_K", "q4_0", "q4_K", "q5_K", "q6_K", "q8_0"):
            rounding = functools.partial(llama_cpp, kind, calibrated)
            found.append(Method(label, kind.upper(), rounding, "llama_cpp", text=text))
    return found

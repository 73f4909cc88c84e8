"""Whether a quantizer gives codes of the form that is asked for, near the weight, and the same ones each time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from kbit_inductor.kernels import reference
from kbit_inductor.kernels.layout import group_count, pack_codes
from kbit_inductor.quantizers import Format, Quantized, Quantizer, Statistics, codebook, rtn
from kbit_inductor.quantizers.registry import Quantize

NO_WORSE = 2.0
"""How many times the squared error of rounding to nearest on the full range an error may be: rounding down has four times."""


def check_quantizer(quantizer: Quantizer | Quantize) -> int:
    """Check ``quantizer`` on Gaussian weights, heavy tails, outliers, constants and weights that codes hold exactly.

    Args:
        quantizer: what :func:`kbit_inductor.register_quantizer` returned, or ``(weight, format, statistics) -> Quantized``.

    Returns:
        How many weights were quantized.

    Raises:
        AssertionError: codes, scales or offsets of a wrong shape, dtype or range; an ``error`` that is not that of the codes; codes
            that are farther from the weight than those of ``"rtn"`` by more than :data:`NO_WORSE`, or inexact where they need not
            be; other codes for the same weight; a weight that was written to.
    """
    quantize = quantizer.quantize if isinstance(quantizer, Quantizer) else quantizer
    count = 0
    for bits, group_size, symmetric in itertools.product((1, 2, 3, 4, 8), (1, 8, 16), (False, True)):
        for name, weight in _weights(bits, group_size, symmetric):
            _check(quantize, name, weight, Format(bits, group_size, symmetric))
            count += 1
    for bits in (2, 4):
        _check(quantize, "gaussian", torch.randn(8, 40), Format(bits, 16, False, codebook("normal", bits)))
        count += 1
    return count


def _weights(bits: int, group_size: int, symmetric: bool) -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(bits)
    gaussian = torch.randn(6, 44, generator=generator)
    outliers = gaussian.clone()
    outliers[:, ::17] *= 30
    yield "gaussian", gaussian
    yield "heavy tails", gaussian / torch.rand(6, 44, generator=generator).clamp_min(0.05)
    yield "outlier columns", outliers
    yield "constant", torch.full((2, 20), -1.5)
    yield "zeros", torch.zeros(2, 20)
    yield "large", gaussian.bfloat16() * 2.0**40
    yield "a row", gaussian[:1, :3]
    if not symmetric:
        yield "exact", _exact(bits, group_size, generator)


def _exact(bits: int, group_size: int, generator: torch.Generator) -> Tensor:
    """A weight each of whose groups lies on a grid of ``2 ** bits`` integers and reaches both of its ends."""
    codes = torch.randint(0, 2**bits, (3, 4, group_size), generator=generator)
    codes[..., 0] = 0
    codes[..., -1] = 2**bits - 1
    low = torch.randint(-64, 64, (3, 4, 1), generator=generator)
    return (codes + low).view(3, -1).float() / 16


def _check(quantize: Quantize, name: str, weight: Tensor, form: Format) -> None:
    where = f"weight {name!r} {list(weight.shape)} of {weight.dtype}, {form}"
    given = weight.clone()
    found = quantize(weight, form, None)
    _require(torch.equal(weight, given), f"it wrote to the weight: {where}")
    _check_form(found, weight, form, where)
    again = quantize(weight, form, Statistics(torch.ones(weight.shape[1]), torch.eye(weight.shape[1]), 1000))
    _check_form(again, weight, form, where)
    _require(torch.equal(found.codes, quantize(given, form, None).codes), f"it gives other codes the second time: {where}")
    restored = _restored(found, weight, form)
    squared = float((restored - weight.double()).square().sum())
    norm = float(weight.double().square().sum())
    error = squared / norm if norm else squared
    # float32 sums of squares, and float16 grids, near zero.
    _require(
        math.isclose(error, found.error, rel_tol=1e-3, abs_tol=1e-6), f"it says error {found.error:.3g}, not {error:.3g}: {where}"
    )
    plain = (_restored(rtn(weight, form), weight, form) - weight.double()).square().sum()
    allowed = NO_WORSE * float(plain) + 2.0**-20 * norm
    _require(squared <= allowed, f"its squared error {squared:.3g} is above {allowed:.3g}: {where}")
    if name == "exact":
        _require(squared == 0, f"codes could hold the weight exactly, and are off by {squared:.3g}: {where}")


def _check_form(found: Quantized, weight: Tensor, form: Format, where: str) -> None:
    rows, columns = weight.shape
    grid = (rows, group_count(columns, form.group_size))
    codes, scale, offset = found.codes, found.scale, found.offset
    _require(codes.shape == weight.shape and codes.dtype == torch.uint8, f"codes are {codes.dtype} {list(codes.shape)}: {where}")
    _require(int(codes.max()) < 2**form.bits, f"code {int(codes.max())} has more than {form.bits} bits: {where}")
    _require(scale.shape == grid and scale.dtype == torch.float16, f"scales are {scale.dtype} {list(scale.shape)}: {where}")
    _require((offset is None) == form.symmetric, f"a symmetric format has no offset, another one has: {where}")
    _require(offset is None or (offset.shape == grid and offset.dtype == torch.float16), f"offsets are of another form: {where}")
    _require(
        math.frexp(float(found.global_scale))[0] == 0.5, f"global_scale {float(found.global_scale)} is no power of two: {where}"
    )


def _restored(found: Quantized, weight: Tensor, form: Format) -> Tensor:
    planes = pack_codes(found.codes, form.bits)
    levels = form.levels.table(weight.device)
    operands = (planes, found.scale, found.offset, found.global_scale)
    return reference.dequantize(*operands, weight.shape[1], form.group_size, torch.float64, levels)


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise AssertionError(f"the quantizer is wrong: {message}")

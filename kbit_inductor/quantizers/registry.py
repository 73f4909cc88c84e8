"""Quantizers by name: frozen records, ours and those that :func:`register_quantizer` adds.

A name stands for one quantizer for as long as the process lives, so what a name means depends on no order of imports.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor

from kbit_inductor.entry_points import load
from kbit_inductor.errors import InvalidOptionError
from kbit_inductor.quantizers.autoround import autoround
from kbit_inductor.quantizers.clip import clip
from kbit_inductor.quantizers.distill import distill
from kbit_inductor.quantizers.format import Format
from kbit_inductor.quantizers.gptq import gptq
from kbit_inductor.quantizers.grid import Quantized
from kbit_inductor.quantizers.hqq import hqq
from kbit_inductor.quantizers.rtn import rtn
from kbit_inductor.quantizers.statistics import Statistics

Quantize = Callable[[Tensor, Format, "Statistics | None"], Quantized]
"""``(weight [N, K] of float32, bfloat16 or float16 and finite, format, statistics of its inputs or None) -> Quantized``.

It must be a function of its arguments alone: the same codes in every process and for every number of threads.
"""

NEEDS = ("nothing", "squares", "hessian", "outputs", "predictions")
WITH_HESSIAN, LEARNING = NEEDS[2:], NEEDS[3:]


@dataclass(frozen=True)
class Quantizer:
    """A method that chooses codes.

    Attributes:
        name: the value of the option ``quantizer``.
        quantize: what computes them.
        needs: the most that it makes use of among :class:`Statistics`: ``"nothing"``, ``"squares"`` (``mean_square``) or
            ``"hessian"``, ``"outputs"``: the Hessian too, and codes that were ``learned`` for what the block around the layer
            returns, or ``"predictions"``: the same for what the whole model returns. Calibration collects no more than that. It
            must also do without.
        shrinks: whether its codes have the least squared error, which makes them too small: what packs them stretches their grids
            (:mod:`kbit_inductor.quantizers.stretch`).
    """

    name: str
    quantize: Quantize
    needs: str = "nothing"
    shrinks: bool = False


GROUP = "kbit_inductor.quantizers"
BUILT_IN = (
    Quantizer("autoround", autoround, "outputs"),
    Quantizer("clip", clip, "squares", shrinks=True),
    Quantizer("distill", distill, "predictions"),
    Quantizer("gptq", gptq, "hessian", shrinks=True),
    Quantizer("hqq", hqq),
    Quantizer("rtn", rtn),
)
_by_name = {quantizer.name: quantizer for quantizer in BUILT_IN}
_lock = threading.Lock()
QUANTIZERS: Mapping[str, Quantizer] = MappingProxyType(_by_name)
"""All quantizers of this process by name."""


def register_quantizer(name: str, quantize: Quantize, needs: str = "nothing") -> Quantizer:
    """Let ``name`` be a value of the option ``quantizer``, computed by ``quantize`` (see :data:`Quantize`).

    Another package does the same by an entry point of the group ``kbit_inductor.quantizers`` that names a :class:`Quantizer`.

    Args:
        name: as the option will say it.
        quantize: ``(weight, format, statistics) -> Quantized``.
        needs: what it makes use of, one of :data:`NEEDS`.

    Raises:
        InvalidOptionError: another quantizer has the name (the same one may come again), or ``needs`` is none of these.
    """
    if needs not in NEEDS:
        raise InvalidOptionError(f"quantizer {name!r} needs {needs!r}; give one of {', '.join(NEEDS)}")
    return add(Quantizer(name, quantize, needs))


def add(quantizer: Quantizer) -> Quantizer:
    """Register a record.

    Raises:
        InvalidOptionError: another quantizer has the name.
    """
    with _lock:
        if _by_name.setdefault(quantizer.name, quantizer) != quantizer:
            raise InvalidOptionError(
                f"there is another quantizer of the name {quantizer.name!r}; register this one by another name"
            )
    return quantizer


def find(name: str) -> Quantizer | None:
    """The quantizer ``name``, ours, registered or of an entry point; None when there is none.

    Raises:
        InvalidOptionError: an entry point that names no quantizer, or another one of a name that is taken.
    """
    if name not in QUANTIZERS:
        for origin, found in load(GROUP):
            if not isinstance(found, Quantizer):
                raise InvalidOptionError(f"{origin} names a {type(found).__name__}; let it name a Quantizer")
            add(found)
    return QUANTIZERS.get(name)

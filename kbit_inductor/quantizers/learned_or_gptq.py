"""How a quantizer hands out codes that were learned for a weight, and what it does where there are none."""

from __future__ import annotations

from torch import Tensor

from kbit_inductor.logs import logger
from kbit_inductor.quantizers.format import Format
from kbit_inductor.quantizers.gptq import gptq
from kbit_inductor.quantizers.grid import Quantized
from kbit_inductor.quantizers.statistics import Statistics

log = logger("pack")


def learned_or_gptq(name: str, weight: Tensor, format: Format, statistics: Statistics | None) -> Quantized:
    """What the quantizer ``name`` gives: the codes learned for ``weight`` ``[N, K]``; where there are none, those of ``"gptq"``."""
    learned = None if statistics is None else statistics.learned
    if learned is None:
        return gptq(weight, format, statistics)
    found = learned.of(weight, format)
    if found is None:
        log.warning(
            "%s: what was learned for a weight of shape %s is of another format or weight; quantizing it by 'gptq'. "
            "Calibrate the model as it is, with the options it is to be quantized with",
            name, tuple(weight.shape),
        )  # fmt: skip
        return gptq(weight, format, statistics)
    return found

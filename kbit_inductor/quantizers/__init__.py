"""Quantizers: weights and statistics of their inputs in, codes out. They know neither graphs nor kernels."""

from __future__ import annotations

from kbit_inductor.quantizers.autoround import LearnedRounding, autoround
from kbit_inductor.quantizers.cascade import Nested, cascade
from kbit_inductor.quantizers.clip import clip
from kbit_inductor.quantizers.codebooks import CODEBOOK_NAMES, Codebook, codebook
from kbit_inductor.quantizers.distill import TunedGrids, distill
from kbit_inductor.quantizers.format import Format
from kbit_inductor.quantizers.gptq import gptq
from kbit_inductor.quantizers.grid import Quantized
from kbit_inductor.quantizers.hqq import hqq
from kbit_inductor.quantizers.learned import Learned
from kbit_inductor.quantizers.levels import Levels
from kbit_inductor.quantizers.registry import QUANTIZERS, Quantizer, register_quantizer
from kbit_inductor.quantizers.rtn import rtn
from kbit_inductor.quantizers.statistics import Statistics

__all__ = [
    "CODEBOOK_NAMES",
    "QUANTIZERS",
    "Codebook",
    "Format",
    "Learned",
    "LearnedRounding",
    "Levels",
    "Nested",
    "Quantized",
    "Quantizer",
    "Statistics",
    "TunedGrids",
    "autoround",
    "cascade",
    "clip",
    "codebook",
    "distill",
    "gptq",
    "hqq",
    "register_quantizer",
    "rtn",
]

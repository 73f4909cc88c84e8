"""A ``torch.compile`` backend for k-bit inference.

``torch.compile(model, backend="kbit")`` needs no import of this package: the backend is found through its entry point.
"""

from __future__ import annotations

from kbit_inductor.backend import kbit
from kbit_inductor.config import Config, LayerConfig
from kbit_inductor.errors import (
    EmptyPromptError,
    InterruptedStreamError,
    InvalidOptionError,
    InvalidPaddingError,
    InvalidPromptError,
    InvalidSamplingError,
    KbitError,
    ModelCallError,
    NonFiniteWeightError,
    NotACausalLMError,
    PromptTooLongError,
    ReleasedWeightError,
    TooManyTokensError,
    TrainingModeError,
    UncapturableModelError,
    UnknownOptionError,
    UnmatchedOverrideError,
    UnsupportedDtypeError,
    UnsupportedShapeError,
)
from kbit_inductor.explain import Explanation, LayerReport, explain
from kbit_inductor.generate import Generator, generate
from kbit_inductor.quantizers import register_quantizer
from kbit_inductor.restore import restore_

__version__ = "0.1.0"

__all__ = [
    "Config",
    "EmptyPromptError",
    "Explanation",
    "Generator",
    "InterruptedStreamError",
    "InvalidOptionError",
    "InvalidPaddingError",
    "InvalidPromptError",
    "InvalidSamplingError",
    "KbitError",
    "LayerConfig",
    "LayerReport",
    "ModelCallError",
    "NonFiniteWeightError",
    "NotACausalLMError",
    "PromptTooLongError",
    "ReleasedWeightError",
    "TooManyTokensError",
    "TrainingModeError",
    "UncapturableModelError",
    "UnknownOptionError",
    "UnmatchedOverrideError",
    "UnsupportedDtypeError",
    "UnsupportedShapeError",
    "explain",
    "generate",
    "kbit",
    "register_quantizer",
    "restore_",
]

"""A ``torch.compile`` backend for k-bit inference.

``torch.compile(model, backend="kbit")`` needs no import of this package: the backend is found through its entry point.
"""

from __future__ import annotations

from kbit_inductor.backend import kbit
from kbit_inductor.config import Config, LayerConfig
from kbit_inductor.errors import (
    InvalidOptionError,
    KbitError,
    ModelCallError,
    NonFiniteWeightError,
    ReleasedWeightError,
    UnknownOptionError,
    UnmatchedOverrideError,
    UnsupportedDtypeError,
    UnsupportedShapeError,
)
from kbit_inductor.explain import Explanation, LayerReport, explain
from kbit_inductor.restore import restore_

__version__ = "0.1.0"

__all__ = [
    "Config",
    "Explanation",
    "InvalidOptionError",
    "KbitError",
    "LayerConfig",
    "LayerReport",
    "ModelCallError",
    "NonFiniteWeightError",
    "ReleasedWeightError",
    "UnknownOptionError",
    "UnmatchedOverrideError",
    "UnsupportedDtypeError",
    "UnsupportedShapeError",
    "explain",
    "kbit",
    "restore_",
]

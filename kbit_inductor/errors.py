"""One exception class per mistake. Every message names the layer or option, says what was wrong and what to do."""

from __future__ import annotations


class KbitError(Exception):
    """Base of every error that this package raises for a mistake of its caller."""


class UnknownOptionError(KbitError, TypeError):
    """An option that does not exist."""


class InvalidOptionError(KbitError, ValueError):
    """An option with a value outside its range or of the wrong type."""


class UnmatchedOverrideError(KbitError, ValueError):
    """An entry of ``overrides`` or ``skip`` that names no layer of the model."""


class NonFiniteWeightError(KbitError, ValueError):
    """A weight that holds NaN or an infinity, so no grid of codes can hold it."""


class UnsupportedDtypeError(KbitError, TypeError):
    """A weight whose dtype cannot be quantized."""


class UnsupportedShapeError(KbitError, ValueError):
    """A weight that is not a matrix."""


class ReleasedWeightError(KbitError, RuntimeError):
    """A use of float weights that ``release_weights=True`` has freed."""


class ModelCallError(KbitError, RuntimeError):
    """A model that cannot be explained because its float forward pass fails on the given inputs."""

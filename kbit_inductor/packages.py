"""Packages that only a part of this one needs."""

from __future__ import annotations

import importlib.util

from kbit_inductor.errors import MissingPackageError


def need(package: str) -> None:
    """Raise MissingPackageError where ``package`` is not installed."""
    if importlib.util.find_spec(package) is None:
        raise MissingPackageError(f"{package} is not installed; pip install {package}")

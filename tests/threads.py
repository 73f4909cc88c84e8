"""Calls with a chosen number of PyTorch's threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def with_threads(threads: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """``function(*arguments)``, computed with ``threads`` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return function(*arguments)
    finally:
        torch.set_num_threads(before)

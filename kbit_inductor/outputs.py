"""What a model returns, as rows, and how far those of another model are from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kbit_inductor.errors import InvalidOptionError


def rows_of(output: Any) -> tuple[Tensor, bool]:
    """The rows ``[R, C]`` of the logits, or else the first tensor, that a model returned, and whether they are logits.

    Raises:
        InvalidOptionError: there is no tensor.
    """
    logits = getattr(output, "logits", None)
    first = logits
    while not isinstance(first, Tensor):
        if isinstance(output, Mapping):
            output = next(iter(output.values()))
        elif isinstance(output, (tuple, list)) and output:
            output = output[0]
        elif not isinstance(output, Tensor):
            raise InvalidOptionError(
                f"models are compared by the tensor that they return; this one returns {type(output).__name__}"
            )
        first = output
    return first.reshape(-1, first.shape[-1]), logits is not None


def divergence(exact: Tensor, found: Tensor, are_logits: bool) -> tuple[Tensor, Tensor]:
    """How far the rows ``found`` ``[R, C]`` are from ``exact``, float64 ``[]``, and what that is to be divided by.

    Of logits it is the KL divergence, by the number of rows; else the squared error, by the squared norm.
    """
    if are_logits:
        was, now = exact.float().log_softmax(-1), found.float().log_softmax(-1)
        return (was.exp() * (was - now)).sum(dtype=torch.float64), torch.tensor(float(len(was)), dtype=torch.float64)
    error = (found.float() - exact.float()).square().sum(dtype=torch.float64)
    return error, exact.float().square().sum(dtype=torch.float64)

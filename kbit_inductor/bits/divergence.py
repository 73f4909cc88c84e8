"""How far a model with some weights packed is from the float one, on given data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kbit_inductor.errors import InvalidOptionError
from kbit_inductor.packing import PackedWeight
from kbit_inductor.substitution import substituted

Batches = Sequence[tuple[tuple[Any, ...], Mapping[str, Any]]]


class Divergence:
    """Runs ``model`` on ``data``: once as it is, and then once for each answer.

    The measure is the mean KL divergence of the next-token distributions where the model returns ``logits``, and the relative
    squared error of its first output elsewhere.
    """

    def __init__(self, model: nn.Module, data: Batches) -> None:
        self._model, self._data = model, data
        self._exact = [_output(model(*arguments, **keywords)) for arguments, keywords in data]

    def of(self, packed: Mapping[Tensor, PackedWeight]) -> float:
        """The divergence with the weights ``packed`` in place of theirs."""
        total = count = 0.0
        with substituted(self._model, packed):
            for (arguments, keywords), (exact, are_logits) in zip(self._data, self._exact, strict=True):
                found, _ = _output(self._model(*arguments, **keywords))
                for was, now in zip(exact.split(64), found.split(64), strict=True):  # rows of a large vocabulary are many
                    part, weight = _kl(was, now) if are_logits else _squares(was, now)
                    total, count = total + part, count + weight
        return total / count if count else 0.0


def _output(output: Any) -> tuple[Tensor, bool]:
    """The rows of a model's output, and whether they are logits."""
    logits = getattr(output, "logits", None)
    first = logits
    while not isinstance(first, Tensor):
        if isinstance(output, Mapping):
            output = next(iter(output.values()))
        elif isinstance(output, (tuple, list)) and output:
            output = output[0]
        elif not isinstance(output, Tensor):
            raise InvalidOptionError(f"bits='auto' with data takes models that return a tensor, not {type(output).__name__}")
        first = output
    return first.reshape(-1, first.shape[-1]), logits is not None


def _kl(exact: Tensor, found: Tensor) -> tuple[float, float]:
    was, now = exact.float().log_softmax(-1), found.float().log_softmax(-1)
    return float((was.exp() * (was - now)).sum(dtype=torch.float64)), float(len(was))


def _squares(exact: Tensor, found: Tensor) -> tuple[float, float]:
    error = (found.float() - exact.float()).square().sum(dtype=torch.float64)
    return float(error), float(exact.float().square().sum(dtype=torch.float64))

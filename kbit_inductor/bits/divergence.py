"""How far a model with some weights packed is from the float one, on given data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from kbit_inductor.outputs import divergence, rows_of
from kbit_inductor.packing import PackedWeight
from kbit_inductor.weights.substitution import substituted

Batches = Sequence[tuple[tuple[Any, ...], Mapping[str, Any]]]


class Divergence:
    """Runs ``model`` on ``data``: once as it is, and then once for each answer.

    The measure is the mean KL divergence of the next-token distributions where the model returns ``logits``, and the relative
    squared error of its first output elsewhere.
    """

    def __init__(self, model: nn.Module, data: Batches) -> None:
        self._model, self._data = model, data
        self._exact = [rows_of(model(*arguments, **keywords)) for arguments, keywords in data]

    def of(self, packed: Mapping[Tensor, PackedWeight]) -> float:
        """The divergence with the weights ``packed`` in place of theirs."""
        total = count = 0.0
        with substituted(self._model, packed):
            for (arguments, keywords), (exact, are_logits) in zip(self._data, self._exact, strict=True):
                found, _ = rows_of(self._model(*arguments, **keywords))
                for was, now in zip(exact.split(64), found.split(64), strict=True):  # rows of a large vocabulary are many
                    part, weight = divergence(was, now, are_logits)
                    total, count = total + float(part), count + float(weight)
        return total / count if count else 0.0

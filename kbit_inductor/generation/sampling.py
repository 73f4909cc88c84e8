"""From logits to the next token: the most likely one, or one drawn at random from those that temperature, top-k and top-p leave."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kbit_inductor.errors import InvalidSamplingError

FIRST_CANDIDATES = 256  # top-p rarely keeps more, and sorting a whole vocabulary costs as much as a layer


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The filters apply in the order of the fields, as in transformers.

    Args:
        temperature: 0 for the most likely token, whatever the other fields are; else what logits are divided by.
        top_k: how many of the most likely tokens are kept, at least 1; None for all.
        top_p: above 0, at most 1: the fewest of the most likely tokens are kept that together have this probability; None for all.

    Raises:
        InvalidSamplingError: a value that its field does not take.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not _is_number(self.temperature) or not 0 <= self.temperature < math.inf:
            raise InvalidSamplingError(
                f"temperature is {self.temperature!r}; give 0 for the most likely token, or a positive number"
            )
        if self.top_k is not None and (isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 1):
            raise InvalidSamplingError(f"top_k is {self.top_k!r}; give a number of tokens, at least 1, or None for all")
        if self.top_p is not None and (not _is_number(self.top_p) or not 0 < self.top_p <= 1):
            raise InvalidSamplingError(f"top_p is {self.top_p!r}; give a probability above 0 and up to 1, or None for all")

    def choose(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The next token of each row: ``[rows, vocabulary]`` logits of any floating dtype to ``[rows]`` int64."""
        if self.temperature == 0:
            return logits.argmax(-1)
        probabilities, tokens = self.candidates(logits)
        drawn = draw(probabilities, generator)
        return (drawn if tokens is None else tokens.gather(1, drawn)).squeeze(1)

    def candidates(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Probabilities, float32 ``[rows, kept]``, and the tokens that they belong to, ``[rows, kept]`` or None for all in order.

        Tokens that are filtered out are left out or have probability 0. Rows sum to 1.
        """
        logits = logits.float()
        # Subtracted first, as a logit over a tiny temperature may be infinite.
        scaled = (logits - logits.amax(-1, keepdim=True)) / self.temperature
        tokens = None
        if self.top_k is not None:
            scaled, tokens = scaled.topk(min(self.top_k, scaled.size(-1)))
        probabilities = scaled.softmax(-1)
        if self.top_p is None or self.top_p == 1:
            return probabilities, tokens
        kept, order = _most_likely(probabilities, self.top_p)
        return kept, order if tokens is None else tokens.gather(1, order)


def draw(probabilities: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """An index of each row, ``[rows, 1]`` int64, drawn with its probability.

    One random number for a row, where torch.multinomial makes one for each of its columns: ten times as fast for a vocabulary.
    """
    # The float32 number is below 1 by more than float64 rounds, so what is looked for is below the sum: a column is found, and one
    # whose probability is above 0, as the first sum above it is one that the column has raised.
    sums = probabilities.cumsum(-1, dtype=torch.float64)
    chance = torch.rand(len(sums), 1, device=sums.device, generator=generator)
    return torch.searchsorted(sums, chance * sums[:, -1:], right=True)


def _most_likely(probabilities: Tensor, total: float) -> tuple[Tensor, Tensor]:
    """The fewest most likely of each row that have ``total`` together, normalized, and where they were; others are 0."""
    count = min(FIRST_CANDIDATES, probabilities.size(-1))
    likely, order = probabilities.topk(count)
    if count < probabilities.size(-1) and bool((likely.sum(-1) < total).any()):
        likely, order = probabilities.sort(descending=True)
    before = likely.cumsum(-1) - likely
    kept = likely.masked_fill(before >= total, 0)
    return kept / kept.sum(-1, keepdim=True), order


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)

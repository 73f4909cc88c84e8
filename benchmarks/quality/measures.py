"""What is measured of a causal language model: perplexity, and how far its predictions are from the float model's."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

RESAMPLES = 1000  # of the windows, for the intervals


@dataclass(frozen=True)
class Scores:
    """By window: mean negative log-likelihood, mean KL divergence from the float model, share of equal first choices."""

    likelihood: np.ndarray
    divergence: np.ndarray
    agreement: np.ndarray

    def summary(self) -> dict[str, Any]:
        """Perplexity, KL and top-1 agreement over all windows, 95 % intervals by resampling the windows, and what each window gave
        (of perplexity its logarithm), for comparisons of two methods on the same ones."""
        random = np.random.default_rng(0)
        picked = random.integers(0, len(self.likelihood), (RESAMPLES, len(self.likelihood)))
        interval = {
            "perplexity": np.exp(self.likelihood[picked].mean(1)),
            "kl": self.divergence[picked].mean(1),
        }
        return {
            "perplexity": math.exp(self.likelihood.mean()),
            "kl": float(self.divergence.mean()),
            "top1": float(self.agreement.mean()),
            "interval": {name: np.percentile(values, [2.5, 97.5]).tolist() for name, values in interval.items()},
            "windows": {"perplexity": _short(self.likelihood), "kl": _short(self.divergence)},
        }


def _short(values: np.ndarray) -> list[float]:
    """Six digits of each, which are enough to compare by."""
    return [float(f"{value:.6g}") for value in values]


def windows(tokens: Iterable[int], length: int, count: int) -> Tensor:
    """The first ``count`` windows of ``length`` tokens that do not overlap, int64 ``[count, length]``."""
    tokens = torch.tensor(list(tokens)[: length * count])
    return tokens[: len(tokens) // length * length].view(-1, length)


@torch.no_grad()
def logits(model: nn.Module, text: Tensor) -> list[Tensor]:
    """Of each window, log-probabilities of every next token."""
    return [model(window[None]).logits[0, :-1].float().log_softmax(-1) for window in text]


def score(found: Iterable[Tensor], exact: Iterable[Tensor], text: Tensor) -> Scores:
    """Compare ``found`` with ``exact``, both log-probabilities as :func:`logits` gives them."""
    rows = []
    for now, was, window in zip(found, exact, text, strict=True):
        likelihood = -now.gather(-1, window[1:, None]).mean()
        divergence = (was.exp() * (was - now)).sum(-1).mean()
        rows.append([float(likelihood), float(divergence), float((now.argmax(-1) == was.argmax(-1)).float().mean())])
    return Scores(*np.array(rows).T)


def relative(row: Mapping[str, Any], exact: Mapping[str, Any]) -> float:
    """Perplexity over the float model's, as a share of it."""
    return float(row["perplexity"] / exact["perplexity"] - 1)

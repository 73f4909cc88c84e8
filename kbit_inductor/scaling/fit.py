"""A law of size and bits, fitted to measured losses, and what follows from it.

    loss(n, k) = E + B n^-alpha + A e^(-k / gamma) n^-beta           n: parameters over those of the largest model

The first two terms are the law of float models in their size (Kaplan et al., 2020; Hoffmann et al., 2022), the third is what k bits
add: Dettmers and Zettlemoyer, "The case for 4-bit precision" (2023), found the curves of different k near-parallel in total bits,
and Kumar et al., "Scaling laws for precision" (2024), have the exponential in k. With beta near 0 the curves are parallel.

Intervals are percentiles of fits to resampled windows of the text, the same windows for all rows. They say what another text of the
kind would change. They say nothing of other models: how far the law is from those measured is ``misfit``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kbit_inductor.errors import InvalidOptionError
from kbit_inductor.packages import need
from kbit_inductor.scaling.sweep import Row

NAMES = ("E", "B", "alpha", "A", "gamma", "beta")
LEAST, MOST = (0.0, 1e-6, 0.0, 1e-6, 0.1, -3.0), (20.0, 1e3, 3.0, 1e4, 10.0, 3.0)
RESAMPLES = 200
FARTHEST = 4.0  # how many times the largest model the law is followed to
SIZES = 13
Numbers = Any  # np.ndarray of float64


@dataclass(frozen=True)
class Choice:
    """The best bits for a total size.

    Attributes:
        total_bits: of all weights, all metadata counted.
        bits: with the lowest loss by the law.
        loss: that one.
        share: how many of the resampled fits choose the same bits.
        extrapolated: whether a model of so many parameters is larger or smaller than all that were measured.
    """

    total_bits: float
    bits: int
    loss: float
    share: float
    extrapolated: bool


@dataclass(frozen=True)
class Law:
    """The fit of one format.

    Attributes:
        format: of the rows.
        values: the parameters by name.
        intervals: of each, 2.5 and 97.5 percentiles.
        misfit: root of the mean squared difference of measured and fitted loss, in nats.
        largest: parameters of the largest model, the unit of ``n``.
        smallest: those of the smallest.
        bits_per_parameter: by ``bits``, all metadata counted.
        choices: from the smallest total size to that of a model :data:`FARTHEST` times as large.
    """

    format: str
    values: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    misfit: float
    largest: int
    smallest: int
    bits_per_parameter: dict[int, float]
    choices: tuple[Choice, ...]

    def loss(self, parameters: float, bits: float) -> float:
        """By the law, of a model of so many parameters; ``bits`` may be infinite: in float."""
        return float(
            predicted(np.array([self.values[name] for name in NAMES]), np.array(parameters / self.largest), np.array(bits))
        )


def predicted(values: Numbers, n: Numbers, bits: Numbers) -> Numbers:
    """The law, for ``values`` in the order of :data:`NAMES`."""
    e, b, alpha, a, gamma, beta = values
    return e + b * n**-alpha + a * np.exp(-bits / gamma) * n**-beta


def fit(rows: Sequence[Row], resamples: int = RESAMPLES) -> list[Law]:
    """The law of each format among ``rows``, which have every model in float as well.

    Raises:
        InvalidOptionError: fewer than three sizes, or fewer than three bits, which leave the law undetermined.
    """
    floats = [row for row in rows if row.bits is None]
    if len({row.parameters for row in floats}) < 3:
        raise InvalidOptionError(f"{len(floats)} models are given; a law of size needs three different sizes at least")
    formats = dict.fromkeys(row.format for row in rows if row.bits is not None)
    return [_law(name, floats, [row for row in rows if row.format == name and row.bits is not None], resamples) for name in formats]


def _law(name: str, floats: list[Row], rounded: list[Row], resamples: int) -> Law:
    bits = sorted({row.bits for row in rounded if row.bits is not None})
    if len(bits) < 3:
        raise InvalidOptionError(f"{name} has {len(bits)} different bits; the law needs three at least")
    rows = [*floats, *rounded]
    largest, smallest = max(row.parameters for row in rows), min(row.parameters for row in rows)
    n = np.array([row.parameters / largest for row in rows])
    k = np.array([math.inf if row.bits is None else row.bits for row in rows])
    losses = np.array([row.loss for row in rows])
    values = _fitted(n, k, losses.mean(1), None)
    random = np.random.default_rng(0)
    drawn = random.integers(0, losses.shape[1], (resamples, losses.shape[1]))
    others = np.array([_fitted(n, k, losses[:, picked].mean(1), values) for picked in drawn])
    low, high = np.percentile(others, [2.5, 97.5], axis=0)
    per_parameter = {b: float(np.mean([row.total_bits / row.parameters for row in rounded if row.bits == b])) for b in bits}
    return Law(
        format=name,
        values=dict(zip(NAMES, values.tolist(), strict=True)),
        intervals={name: (float(a), float(b)) for name, a, b in zip(NAMES, low, high, strict=True)},
        misfit=float(np.sqrt(np.square(predicted(values, n, k) - losses.mean(1)).mean())),
        largest=largest,
        smallest=smallest,
        bits_per_parameter=per_parameter,
        choices=tuple(_choices(values, others, per_parameter, smallest, largest)),
    )


def _fitted(n: Numbers, bits: Numbers, losses: Numbers, start: Numbers | None) -> Numbers:
    need("scipy")
    from scipy.optimize import least_squares

    if start is None:
        start = np.array([losses.min() / 2, losses.min() / 2, 0.3, 10.0, 1.0, 0.0])
    # Relative, so that few bits of a small model do not count for all.
    return least_squares(
        lambda values: predicted(values, n, bits) / losses - 1,
        np.clip(start, LEAST, MOST),
        bounds=(LEAST, MOST),
        x_scale=[1, 1, 0.1, 10, 1, 0.1],
    ).x


def _choices(values: Numbers, others: Numbers, per_parameter: dict[int, float], smallest: int, largest: int) -> list[Choice]:
    """The best bits at total sizes that a model of each bits could have, from the smallest on."""
    bits = np.array(list(per_parameter))
    rates = np.array(list(per_parameter.values()))
    found = []
    for total in np.geomspace(smallest * rates.max(), FARTHEST * largest * rates.min(), SIZES):
        sizes = total / rates
        losses = predicted(values, sizes / largest, bits)
        best = int(losses.argmin())
        votes = [int(predicted(other, sizes / largest, bits).argmin()) for other in others]
        outside = not smallest <= sizes[best] <= largest
        share = float(np.mean([vote == best for vote in votes])) if votes else math.nan
        found.append(Choice(float(total), int(bits[best]), float(losses[best]), share, outside))
    return found

"""The choice of one option for each of several items with the least total cost under a budget: exact, by dynamic programming."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Option = tuple[int, float]
"""``(size, cost)``."""


def choose(items: Sequence[Sequence[Option]], budget: int) -> list[int] | None:
    """The index of the option taken of each of ``items``, with total size at most ``budget`` and the least total cost; None where
    nothing fits. Of equal costs the smaller size is taken.

    States are (size, cost) sums that no other beats in both, so there are never more of them than there are different sizes.
    """
    sizes, costs = np.zeros(1, dtype=np.int64), np.zeros(1)
    steps: list[tuple[np.ndarray, np.ndarray]] = []  # of each state: the state before it, and the option taken
    least_left = sum(min(size for size, _ in options) for options in items)
    for options in items:
        least_left -= min(size for size, _ in options)
        option_sizes = np.array([size for size, _ in options], dtype=np.int64)
        option_costs = np.array([cost for _, cost in options])
        all_sizes = (sizes[:, None] + option_sizes).ravel()
        all_costs = (costs[:, None] + option_costs).ravel()
        kept = _undominated(all_sizes, all_costs, budget - least_left)
        if not len(kept):
            return None
        steps.append((kept // len(options), kept % len(options)))
        sizes, costs = all_sizes[kept], all_costs[kept]
    state, taken = len(sizes) - 1, []  # costs fall with the size: the last is the best
    for before, option in reversed(steps):
        taken.append(int(option[state]))
        state = int(before[state])
    return taken[::-1]


def _undominated(sizes: np.ndarray, costs: np.ndarray, budget: int) -> np.ndarray:
    """The indices of those within ``budget`` that cost less than all that are no larger, by size."""
    order = np.lexsort((costs, sizes))
    order = order[sizes[order] <= budget]
    falling = np.minimum.accumulate(costs[order])
    first = np.ones(len(order), dtype=bool)
    first[1:] = falling[1:] < falling[:-1]
    return order[first]

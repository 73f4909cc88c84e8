"""Layers that repeat, told once in a table: ``model.layers.0-29`` and below it ``mlp.up_proj``, for thirty of them."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

Item = TypeVar("Item")
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # between dots: an index of a list of modules


@dataclass(frozen=True)
class Row(Generic[Item]):
    """Items of one kind whose names differ by numbers alone.

    Attributes:
        block: their names up to the first number that differs, as ``model.layers.0-29``; of one item, up to its first number.
        rest: of their names, without the dot.
        items: in the order they came.
    """

    block: str
    rest: str
    items: tuple[Item, ...]

    @property
    def name(self) -> str:
        """All of the name."""
        return ".".join(filter(None, (self.block, self.rest)))


def rows(items: Iterable[Item], name: Callable[[Item], str], kind: Callable[[Item], Hashable]) -> list[Row[Item]]:
    """``items`` in rows, those of a block one after the other, where its first one came.

    Names of a row hold every combination of their numbers; where one is missing, each item has a row of its own.
    """
    groups: dict[Hashable, list[Item]] = {}
    for item in items:
        groups.setdefault((_NUMBER.sub("*", name(item)), kind(item)), []).append(item)
    found = list(itertools.chain.from_iterable(_rows(group, name) for group in groups.values()))
    blocks: dict[str, list[Row[Item]]] = {}
    for row in found:
        blocks.setdefault(row.block or row.rest, []).append(row)
    return list(itertools.chain.from_iterable(blocks.values()))


def lines(found: Iterable[Row[Item]]) -> Iterator[tuple[str, Row[Item] | None]]:
    """The first cell of each line of a table, and its row; a block of several rows has a line of its own before them."""
    for block, members in itertools.groupby(found, lambda row: row.block or row.rest):
        together = list(members)
        if len(together) > 1:
            yield block, None
        for row in together:
            yield (f"  {row.rest or block}" if len(together) > 1 else row.name), row


def names(of: Iterable[str]) -> list[str]:
    """Names of layers for a message: ``model.layers.0-29.mlp.up_proj`` for thirty of them."""
    return [row.name for row in rows(of, str, lambda _: None)]


def _rows(group: list[Item], name: Callable[[Item], str]) -> Iterator[Row[Item]]:
    """One row, or one for each item."""
    numbers = [tuple(map(int, _NUMBER.findall(name(item)))) for item in group]
    values = [sorted(set(each)) for each in zip(*numbers, strict=True)]
    if len(set(numbers)) < len(group) or math.prod(map(len, values)) > len(group):
        for item in group:
            yield from _rows([item], name)
        return
    spans = iter(map(_span, values))
    parts = [next(spans) if _NUMBER.fullmatch(part) else part for part in name(group[0]).split(".")]
    varied = [len(set(each)) > 1 for each in zip(*(name(item).split(".") for item in group), strict=True)]
    numbered = [_NUMBER.fullmatch(part) is not None for part in name(group[0]).split(".")]
    places = varied if any(varied) else numbered
    end = 1 + places.index(True) if any(places) else 0
    yield Row(".".join(parts[:end]), ".".join(parts[end:]), tuple(group))


def _span(values: list[int]) -> str:
    """``"0-2,5"`` of 0, 1, 2 and 5."""
    runs = [list(run) for _, run in itertools.groupby(enumerate(values), lambda pair: pair[1] - pair[0])]
    return ",".join(str(run[0][1]) if len(run) == 1 else f"{run[0][1]}-{run[-1][1]}" for run in runs)

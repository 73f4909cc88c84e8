"""Layers that repeat, in rows: every item is in one of them, and a row's name says whose it is."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kbit_inductor import alike


def told(names: list[str], kinds: dict[str, int] | None = None) -> list[str]:
    return [row.name for row in alike.rows(names, str, lambda name: (kinds or {}).get(name, 0))]


@pytest.mark.parametrize(
    ("names", "rows"),
    [
        ([], []),
        (["head"], ["head"]),
        (["0", "2", "3"], ["0,2-3"]),
        (["a.0.b", "a.1.b", "a.0.c"], ["a.0-1.b", "a.0.c"]),
        (["a.0.e.0.w", "a.0.e.1.w", "a.1.e.0.w", "a.1.e.1.w"], ["a.0-1.e.0-1.w"]),
        (["a.5.e.0.w", "a.5.e.1.w"], ["a.5.e.0-1.w"]),
        (["a.0.e.0.w", "a.1.e.1.w"], ["a.0.e.0.w", "a.1.e.1.w"]),  # a.0-1.e.0-1 would be four
        (["conv1", "conv2"], ["conv1", "conv2"]),
        (["a.0", "a.0"], ["a.0", "a.0"]),
    ],
)  # fmt: skip
def test_names_that_differ_by_numbers_are_one_row(names: list[str], rows: list[str]) -> None:
    assert told(names) == rows


def test_other_kinds_are_other_rows_and_blocks_stay_together() -> None:
    names = [f"a.{index}.{part}" for index in range(3) for part in ("b", "c")] + ["head"]
    assert told(names, {"a.1.c": 1}) == ["a.0-2.b", "a.0,2.c", "a.1.c", "head"]
    found = alike.rows(names, str, lambda _: 0)
    assert [line for line, _ in alike.lines(found)] == ["a.0-2", "  b", "  c", "head"]


@settings(max_examples=30)
@given(st.lists(st.builds("{}.{}.{}".format, st.sampled_from("ab"), st.integers(0, 3), st.integers(0, 2)), max_size=12))
def test_rows_hold_each_item_once_and_their_names_stand_for_them(names: list[str]) -> None:
    found = alike.rows(names, str, lambda _: 0)
    assert sorted(itertools.chain.from_iterable(row.items for row in found)) == sorted(names)
    for row in found:
        stands_for = [".".join(parts) for parts in itertools.product(*map(values, row.name.split(".")))]
        assert sorted(stands_for) == sorted(row.items)


def values(part: str) -> list[str]:
    """What ``"0-2,4"`` stands for."""
    spans = [re.fullmatch(r"(\d+)(?:-(\d+))?", span) for span in part.split(",")]
    return [str(each) for span in spans if span for each in range(int(span[1]), int(span[2] or span[1]) + 1)] or [part]

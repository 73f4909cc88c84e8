"""What commands write into pages of the documentation: each between two comments that name it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def replace(page: Path, name: str, lines: Iterable[str]) -> None:
    """Put ``lines`` between ``<!-- name: begin -->`` and ``<!-- name: end -->`` in ``page``, in place of what stands there.

    Raises:
        SystemExit: the page has no such comments.
    """
    marks = [f"<!-- {name}: {which} -->" for which in ("begin", "end")]
    before, begin, rest = page.read_text(encoding="utf-8").partition(marks[0])
    _, end, after = rest.partition(marks[1])
    if not begin or not end:
        raise SystemExit(f"{page.name} has no lines {marks[0]} and {marks[1]}")
    page.write_text("\n".join([before + begin, *lines, end + after]), encoding="utf-8")

"""What rich draws, as plain text: ``str`` of the objects that print as tables."""

from __future__ import annotations

import io

from rich.console import Console, ConsoleRenderable, RichCast

WIDTH = 160


def printed(drawn: ConsoleRenderable | RichCast) -> str:
    """``drawn`` as lines of up to :data:`WIDTH` characters, without colours."""
    text = io.StringIO()
    Console(file=text, width=WIDTH).print(drawn)
    return text.getvalue()

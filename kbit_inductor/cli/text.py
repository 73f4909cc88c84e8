"""Tokens as text, while they come."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from kbit_inductor.progress import first_awaited

COMPILING = "compiling the model: a minute or more, the first time"
COMPILED_FOR = 2  # tokens: the first comes from the graph of a prompt, the second from that of a step


def pieces(stream: Iterable[Tensor], tokenizer: Any, tokens: list[int]) -> Iterator[str]:
    """What each token of ``stream``, int64 ``[1]``, adds to the text. All tokens are in ``tokens`` at the end."""
    shown = ""
    for token in first_awaited(stream, COMPILED_FOR, COMPILING):
        tokens.append(int(token[0]))
        written = tokenizer.decode(tokens, skip_special_tokens=True)
        if not written.endswith("\N{REPLACEMENT CHARACTER}"):  # the bytes of a character may come in several tokens
            yield written[len(shown) :]
            shown = written

"""Files that may be damaged: what is caught where another package parses them, and sizes that no file of its length can have."""

from __future__ import annotations

from typing import Any

from kbit_inductor.errors import ModelMismatchError

PARSING_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, BufferError, LookupError, MemoryError, OSError, RuntimeError, TypeError,
    ValueError,
)  # fmt: skip
"""Parsers of others check little: what a wrong number raises depends on where it is first used."""
SIZES = ("size", "dim", "head", "expert", "embd", "inner", "rank")  # parts of the names of options


def check_sizes(config: Any, tensors: int, nbytes: int, source: object) -> None:
    """Raise ModelMismatchError where ``config`` asks for more than a file can have: to build that model would take all memory.

    Args:
        config: of a model of transformers.
        tensors: how many there are, of which each layer has some.
        nbytes: of the files; no extent of a tensor is larger than their bits.
        source: a name for the message.
    """
    layers = getattr(config, "num_hidden_layers", 0)
    sizes = {name: value for name, value in config.to_dict().items() if any(part in name for part in SIZES)}
    large = [name for name, value in sizes.items() if isinstance(value, (int, float)) and not abs(value) <= 8 * nbytes]
    if not isinstance(layers, int) or layers > tensors or large:
        what = f"{large[0]} {sizes[large[0]]}" if large else f"{layers} layers"
        raise ModelMismatchError(
            f"{source} describes a model with {what}, and has {tensors} tensors of {nbytes} bytes; copy it anew"
        )

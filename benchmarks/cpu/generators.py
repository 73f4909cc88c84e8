"""The rows of the whole-model comparison: from a row's name to something that generates.

Names: ``kbit-4``, ``transformers-4`` (``generate`` of transformers on the same steps), ``eager-float32``, ``inductor-bfloat16``,
``llama.cpp-Q4_0``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpu import llama

Generate = Callable[[list[int], int], list[int]]
FLOATS = ("eager-float32", "eager-bfloat16", "inductor-float32", "inductor-bfloat16")


@dataclass(frozen=True)
class Loaded:
    """A generator and what it keeps, in bytes: ``generate(tokens, new)`` gives ``new`` tokens."""

    generate: Generate
    weight_bytes: int
    cache_bytes: int


def imports(variant: str) -> None:
    """Import the libraries of a row, so that the memory they take can be told from the model's."""
    if variant.startswith("llama.cpp"):
        import llama_cpp  # noqa: F401
    else:
        import smollm2

        import kbit_inductor  # noqa: F401

        smollm2.silence()


def load(folder: Path, variant: str, length: int) -> Loaded:
    """The row ``variant`` on the model in ``folder``, with room for ``length`` tokens."""
    way, _, kind = variant.partition("-")
    return {"kbit": _kbit, "transformers": _kbit, "eager": _floats, "inductor": _floats, "llama.cpp": _llama}[way](
        folder, way, kind, length
    )


def _kbit(folder: Path, way: str, kind: str, length: int) -> Loaded:
    import measure
    import smollm2
    import torch

    from kbit_inductor import Generator, custom_generate

    model, _ = smollm2.load(folder)
    model.generation_config.eos_token_id = None  # all rows write as many tokens
    generator = Generator(model, length, options={"bits": int(kind), "end_bits": 1, "release_weights": True})
    more = {"do_sample": False, "custom_generate": custom_generate(generator)} if way == "transformers" else {}
    write = model.generate if way == "transformers" else generator.generate

    def generate(tokens: list[int], new: int) -> list[int]:
        ids = torch.tensor([tokens])
        texts = write(ids, max_new_tokens=new, attention_mask=torch.ones_like(ids), **more)  # else padding is guessed from tokens
        return list(texts[0, len(tokens) :].tolist())

    _warm_up(generate, length)
    return Loaded(generate, measure.weight_bytes(model), cache_bytes(model.config, length, model.dtype.itemsize))


def _floats(folder: Path, way: str, kind: str, length: int) -> Loaded:
    import measure
    import smollm2
    import torch

    from cpu.greedy import Greedy

    model, _ = smollm2.load(folder)
    model = model.to(getattr(torch, kind))
    greedy = Greedy(model, torch.compile(model, dynamic=False) if way == "inductor" else model, length)
    _warm_up(greedy, length)
    return Loaded(greedy, measure.weight_bytes(model), cache_bytes(model.config, length, model.dtype.itemsize))


def _llama(folder: Path, way: str, kind: str, length: int) -> Loaded:
    path = llama.path_of(folder, kind)
    greedy = llama.Greedy(path, length, threads())
    _warm_up(greedy, length)
    return Loaded(greedy, path.stat().st_size, greedy.cache_bytes)


def threads() -> int:
    """The cores of this process, as torch counts its threads."""
    return int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))


def cache_bytes(config: Any, length: int, itemsize: int) -> int:
    """Bytes of keys and values for ``length`` tokens."""
    width = config.hidden_size // config.num_attention_heads * config.num_key_value_heads
    return int(2 * config.num_hidden_layers * width * length * itemsize)


def _warm_up(generate: Generate, length: int) -> None:
    """Compile for a single token, and for the longest prompt that :mod:`cpu.models` gives."""
    generate([1, 2, 3], 2)
    generate([1] * (length - 1), 1)

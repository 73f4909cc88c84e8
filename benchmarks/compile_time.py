"""Where the first compiled call of a Llama of 32 layers spends its time: capture, each pass, packing, Inductor, the call itself.

``.venv/bin/python benchmarks/compile_time.py`` takes about three minutes on two cores. It compiles a random model as one graph by
Inductor and by kbit, each in a process of its own on empty caches, and writes ``benchmarks/results/compile_time.json`` and
``docs/compile-time.md``.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console

from kbit_inductor import backend
from kbit_inductor.passes import pipeline
from kbit_inductor.weights.store import STORE

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "compile_time.json"
PAGE = HERE.parent / "docs" / "compile-time.md"
LAYERS, TOKENS = 32, 8
SIZES = {
    "hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 2000,
    "num_hidden_layers": LAYERS,
}  # fmt: skip
MOST_OF_PASSES, MOST_OF_INDUCTOR = 0.10, 1.5
PARTS = {
    "capture": "Dynamo, and the call itself",
    "weights": "weights found, graph copied",
    "packing": "packing the weights",
    "inductor": "AOTAutograd and Inductor",
}


class Seconds:
    """How long parts of a call took, by name; a part inside of another is not counted twice."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)
        self._inner = [0.0]

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, whose time is counted as ``name``."""

        @functools.wraps(function)
        def call(*arguments: Any, **keywords: Any) -> Any:
            self._inner.append(0.0)
            start = time.perf_counter()
            try:
                return function(*arguments, **keywords)
            finally:
                whole = time.perf_counter() - start
                self.spent[name] += whole - self._inner.pop()
                self._inner[-1] += whole

        return call

    def before(self, gm: Any, context: Any) -> None:
        """Nothing is timed before the first pass."""

    def after(self, each: Any, gm: Any, context: Any, seconds: float) -> None:
        """Count the pass ``each``."""
        self.spent[f"pass {each.name}"] += seconds
        self._inner[-1] += seconds


def main() -> None:
    if len(sys.argv) == 2:
        print(json.dumps(measure(sys.argv[1])))
        return
    found = {name: _apart(name) for name in ("inductor", "kbit")}
    results = {"torch": torch.__version__, "layers": LAYERS, "tokens": TOKENS, "seconds": found}
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    PAGE.write_text(render(results), encoding="utf-8")
    Console().print(render(results), highlight=False, soft_wrap=True)


@torch.no_grad()
def measure(name: str) -> dict[str, float]:
    """Seconds of each part of the first call, compiled by the backend ``name``."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    torch.compile(torch.nn.Linear(64, 64), backend=name)(torch.randn(2, 64))  # what is imported and started once
    seconds = Seconds()
    run = torch.compile(model, backend=_watched(name, seconds))
    seconds.timed("capture", run)(torch.arange(TOKENS)[None], use_cache=False)
    return dict(seconds.spent)


def _watched(name: str, seconds: Seconds) -> Callable[..., Any]:
    """The backend ``name`` with its parts timed."""
    if name == "inductor":
        return seconds.timed("inductor", torch._dynamo.lookup_backend("inductor"))
    backend.inductor = seconds.timed("inductor", backend.inductor)
    STORE.packed = seconds.timed("packing", STORE.packed)  # type: ignore[method-assign]
    run = pipeline.run
    pipeline.run = lambda gm, context, passes, observers=(): run(gm, context, passes, [*observers, seconds])
    return seconds.timed("weights", backend.kbit)


def _apart(name: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory(prefix="kbit-compile-time-") as cache:
        done = subprocess.run(
            [sys.executable, __file__, name], env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}, check=True,
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
    return {part: float(took) for part, took in json.loads(done.stdout.splitlines()[-1]).items()}


def render(results: dict[str, Any]) -> str:
    """The page for ``results``."""
    ours, theirs = results["seconds"]["kbit"], results["seconds"]["inductor"]
    whole, plain = sum(ours.values()), sum(theirs.values())
    passes = {name: took for name, took in ours.items() if name.startswith("pass ")}
    share, ratio = sum(passes.values()) / whole, whole / plain
    lines = [
        "# Compile time\n",
        f"First call of a random Llama of {results['layers']} layers, one graph, {results['tokens']} tokens, empty caches of",
        f"Inductor, the C++ kernels built. torch {results['torch']}. Written by `python benchmarks/compile_time.py`, from",
        "`benchmarks/results/compile_time.json`.\n",
        f"* The passes take {share:.1%} of the call; the aim is {MOST_OF_PASSES:.0%} at most{_short(share, MOST_OF_PASSES)}.",
        f"* The call takes {ratio:.2f} times as long as with Inductor alone; the aim is {MOST_OF_INDUCTOR} at most"
        f"{_short(ratio, MOST_OF_INDUCTOR)}.\n",
        "| part | kbit, s | Inductor, s |", "|---|---|---|",
        *(f"| {text} | {ours.get(name, 0):.2f} | {theirs.get(name, 0):.2f} |" for name, text in PARTS.items()),
        *(f"| {name} | {took:.2f} | |" for name, took in passes.items()),
        f"| together | {whole:.2f} | {plain:.2f} |",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _short(value: float, aim: float) -> str:
    return "" if value <= aim else ": not reached"


if __name__ == "__main__":
    main()

"""First compiled call of SmolLM2-135M as one graph, by Inductor and by kbit: on empty caches, then in a second process.

``.venv/bin/python benchmarks/first_call.py`` takes about four minutes on two cores and writes
``benchmarks/results/first_call.json``. Each call is made by a process of its own, in turns. ``kbit, kernels built`` is an empty
Inductor cache with the C++ kernels, which are built once per machine, already there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import smollm2
import torch
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).resolve().parent / "results" / "first_call.json"
# (row, backend, Inductor's cache, the kernels' cache): a cache used for the first time is empty.
RUNS = (
    ("Inductor, first process", "inductor", "a", "a"),
    ("kbit, first process", "kbit", "b", "b"),
    ("Inductor, second process", "inductor", "a", "a"),
    ("kbit, second process", "kbit", "b", "b"),
    ("kbit, kernels built", "kbit", "c", "b"),
)


def main() -> None:
    if len(sys.argv) == 3:
        print(json.dumps(measure(Path(sys.argv[1]), sys.argv[2])))
        return
    smollm2.silence()
    with tempfile.TemporaryDirectory(prefix="kbit-first-call-") as name:
        folder = Path(name)
        model, tokenizer = smollm2.read_package()
        smollm2.save(folder, model, smollm2.tokenize(tokenizer, 512, 512, 1))
        results = {row: run_apart(folder, backend, inductor, kernels) for row, backend, inductor, kernels in RUNS}
    RESULTS.write_text(json.dumps({"torch": torch.__version__, "seconds": results}, indent=2) + "\n", encoding="utf-8")
    show(results)


def measure(folder: Path, backend: str) -> float:
    """Seconds of the first call on 8 tokens, compilation and packing included."""
    smollm2.silence()
    floats, _ = smollm2.load(folder)
    model = torch.compile(floats, backend=backend)
    tokens = torch.arange(100, 108).view(1, 8)
    start = time.perf_counter()
    with torch.no_grad():
        model(tokens)
    return time.perf_counter() - start


def run_apart(folder: Path, backend: str, inductor: str, kernels: str) -> float:
    """:func:`measure` in a process of its own with the caches of these names."""
    caches = {"TORCHINDUCTOR_CACHE_DIR": f"inductor-{inductor}", "KBIT_CACHE_DIR": f"kernels-{kernels}"}
    environment = os.environ | {variable: str(folder / cache) for variable, cache in caches.items()}
    command = [sys.executable, __file__, str(folder), backend]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def show(results: dict[str, float]) -> None:
    table = Table("", "seconds", "of Inductor's first", "of its own first", title="First call, SmolLM2-135M, one graph")
    for (row, backend, _, _), seconds in zip(RUNS, results.values(), strict=True):
        own = results["Inductor, first process" if backend == "inductor" else "kbit, first process"]
        table.add_row(row, f"{seconds:.1f}", f"{seconds / results['Inductor, first process']:.2f}", f"{seconds / own:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()

"""How long packing and loading a model take, and how much memory: each in a process of its own.

    python benchmarks/loading.py

It writes ``benchmarks/results/loading.json`` and the table of docs/models.md. Weights are random, as what they are changes neither,
but for SmolLM2's GGUF file, which is taken over. Files are in the system's cache when they are read.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import smollm2
import torch
from measure import cpu_name, reset_peak, status
from page import replace
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import kbit_inductor as kbit
from kbit_inductor.models.surgery import packed_matrices
from kbit_inductor.weights.release import trim_heap

REPOSITORY = Path(__file__).resolve().parent.parent
PAGE, RESULTS = REPOSITORY / "docs" / "models.md", REPOSITORY / "benchmarks" / "results" / "loading.json"
OPTIONS = {"bits": 4}
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 512}
SHAPES: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "vocab_size": 49152, "tie_word_embeddings": True,
    },
    "TinyLlama-1.1B": {
        "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
        "num_key_value_heads": 4, "vocab_size": 32000,
    },
}  # fmt: skip
Row = dict[str, Any]


def llama(shape: dict[str, Any]) -> nn.Module:
    """A Llama in float32, of random weights."""
    return LlamaForCausalLM(LlamaConfig(**shape)).eval()


def quantize(name: str, folder: Path) -> Row:
    """Make the floats of ``name``, pack them and save them to ``folder``."""
    kbit.quantize_(llama(SMALL), OPTIONS)  # what is loaded once
    before = _resident()
    model = llama(SHAPES[name])
    floats = sum(parameter.nbytes for parameter in model.parameters())
    reset_peak()  # making the floats may take more than they do
    row = _measured(lambda: kbit.quantize_(model, OPTIONS), before)
    kbit.save(model, folder)
    return {**row, "float_bytes": floats, "peak_over_floats": row["peak_bytes"] / floats}


def load(name: str, folder: Path) -> Row:
    """Load what is in ``folder``."""
    with tempfile.TemporaryDirectory() as small:
        kbit.save(kbit.quantize_(llama(SMALL), OPTIONS), small)
        kbit.load(small)  # what is loaded once
    before = _resident()
    row = _measured(lambda: kbit.load(folder), before)
    return {**row, "peak_over_packed": row["peak_bytes"] / row["packed_bytes"]}


def gguf(name: str, folder: Path) -> Row:
    """Take SmolLM2's GGUF file over and save it to ``folder``."""
    for package in ("accelerate", "gguf", "transformers.modeling_gguf_pytorch_utils"):
        importlib.import_module(package)  # what is loaded once
    row = _measured(lambda: kbit.from_gguf(smollm2.gguf_file()), _resident(), folder)
    return {**row, "file_bytes": smollm2.gguf_file().stat().st_size}


OPERATIONS: dict[str, Callable[[str, Path], Row]] = {"quantize_": quantize, "load": load, "from_gguf": gguf}
STEPS = [
    ("SmolLM2-135M", "quantize_"), ("SmolLM2-135M", "load"), ("SmolLM2-135M's file", "from_gguf"), ("SmolLM2-135M's file", "load"),
    ("TinyLlama-1.1B", "quantize_"), ("TinyLlama-1.1B", "load"),
]  # fmt: skip


def _resident() -> int:
    trim_heap()
    return reset_peak()


def _measured(make: Callable[[], nn.Module], before: int, folder: Path | None = None) -> Row:
    """What ``make`` takes: the peak since the last reset over ``before``, and what is left of it."""
    start = time.perf_counter()
    model = make()
    seconds = time.perf_counter() - start
    peak = status("VmHWM") - before
    trim_heap()
    packed = sum(matrix.packed.nbytes for matrix in packed_matrices(model))
    if folder is not None:
        kbit.save(model, folder)
    return {"seconds": round(seconds, 2), "peak_bytes": peak, "left_bytes": status("VmRSS") - before, "packed_bytes": packed}


def table(results: dict[str, Any]) -> list[str]:
    """The rows in Markdown."""
    lines = [f"On {results['cpu']}, {results['threads']} threads, torch {results['torch']}:", ""]
    lines += ["| model | call | seconds | packed, MB | peak, MB | peak over |", "|---|---|---:|---:|---:|---:|"]
    for row in results["rows"]:
        whole = ("packed", row["packed_bytes"]) if "float_bytes" not in row else ("floats", row["float_bytes"])
        sizes = " | ".join(f"{row[key] / 1e6:.1f}" for key in ("packed_bytes", "peak_bytes"))
        ratio = f"{row['peak_bytes'] / whole[1]:.2f} × {whole[0]}"
        lines.append(f"| {row['model']} | `{row['call']}` | {row['seconds']:.1f} | {sizes} | {ratio} |")
    return lines


def write(results: dict[str, Any]) -> None:
    """Write the JSON, and the table of the page."""
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    replace(PAGE, "loading", table(results))


def main() -> None:
    """Measure each step in a process of its own, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step", nargs=3, metavar=("MODEL", "CALL", "FOLDER"), help="measure one, and print it")
    told = parser.parse_args().step
    smollm2.silence()
    if told:
        print(json.dumps({"model": told[0], "call": told[1], **OPERATIONS[told[1]](told[0], Path(told[2]))}))
        return
    rows = []
    with tempfile.TemporaryDirectory(prefix="kbit-loading-") as folder:
        for name, call in STEPS:
            command = [sys.executable, __file__, "--step", name, call, str(Path(folder) / name)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(rows[-1], file=sys.stderr)
    machine = {"cpu": cpu_name(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    write({**machine, "options": OPTIONS, "shapes": SHAPES, "rows": rows})


if __name__ == "__main__":
    main()

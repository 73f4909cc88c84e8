"""SmolLM2-135M as an exported package: run by the example in C++, its sizes, memory, and how many tokens are the model's; and
how long a call takes, beside the backend's.

``.venv/bin/python benchmarks/package.py`` takes some minutes and writes ``benchmarks/results/package.json`` and the
tables of docs/deploy.md. The weights are those of the GGUF file, code by code. The memory is that of a process without Python.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

import smollm2
import torch
from measure import cpu_name, timed
from page import replace
from rich.console import Console
from torch import Tensor

import kbit_inductor as kbit
from kbit_inductor.kernels.cpu import build as cpu
from kbit_inductor.models.surgery import packed_matrices

HERE = Path(__file__).resolve().parent
PAGE, RESULTS = HERE.parent / "docs" / "deploy.md", HERE / "results" / "package.json"
PROMPT = "Gravity is"
NEW_TOKENS = 16
LENGTHS = (1, 16, 128)  # tokens of a call that is timed
REPEATS = 15
CMAKE = shutil.which("cmake", path=os.pathsep.join((sysconfig.get_path("scripts"), os.environ["PATH"]))) or "cmake"


@torch.no_grad()
def main() -> None:
    smollm2.silence()
    file, tokenizer = smollm2.gguf_file(), smollm2.read_tokenizer()
    model: Any = kbit.from_gguf(file)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    with tempfile.TemporaryDirectory(prefix="kbit-package-") as name:
        folder = Path(name)
        start = time.perf_counter()
        package = kbit.export(model, {"input_ids": ids.expand(2, -1), "use_cache": False}, folder / "model.pt2")
        seconds = time.perf_counter() - start
        tokens, memory = run(build(folder / "build"), package, ids[0].tolist())
        times = milliseconds(model, package)
        sizes = {"package": package.stat().st_size, "kernels": cpu.build().stat().st_size}
    results = {
        "torch": torch.__version__,
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "export_seconds": round(seconds, 1),
        "bytes": {
            "gguf": file.stat().st_size,
            "packed weights": sum(matrix.packed.nbytes for matrix in packed_matrices(model)),
            "float32 weights": sum(4 * matrix.rows * matrix.columns for matrix in packed_matrices(model)),
            **sizes,
        },
        "memory": memory,
        "milliseconds_of_a_call": times,
        "text": tokenizer.decode(tokens),
        "tokens_beside_the_models": parting(model, ids, tokens),
    }
    write(results)
    Console().print(results)


def parting(model: Any, ids: Tensor, tokens: list[int]) -> dict[str, float]:
    """How many of ``tokens`` the model itself writes after ``ids [1, M]``, and where it parts from them, by how much it prefers
    another one, as a share of the range of its logits. Sums in another order move logits by one or two per cent of that: they send
    activations to the next of 255 steps."""
    for count, token in enumerate(tokens):
        logits = model(ids, use_cache=False).logits[0, -1]
        if int(logits.argmax()) != token:
            return {"alike": count, "margin": float((logits.max() - logits[token]) / (logits.max() - logits.min()))}
        ids = torch.cat([ids, torch.tensor([[token]])], 1)
    return {"alike": len(tokens)}


def write(results: dict[str, Any]) -> None:
    """Write the JSON, and the tables of the page."""
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    replace(PAGE, "package", table(results))


def table(results: dict[str, Any]) -> list[str]:
    """What is measured, in Markdown."""
    sizes, memory = results["bytes"], results["memory"]
    whole = {
        "weights in float32": sizes["float32 weights"],
        "packed weights": sizes["packed weights"],
        "package": sizes["package"],
        "library of the kernels": sizes["kernels"],
        "C++ program: `RssAnon`": memory["RssAnon"],
        "C++ program: `RssFile`": memory["RssFile"],
    }
    lines = ["| SmolLM2-135M | MB |", "|---|---:|", *(f"| {name} | {size / 1e6:.1f} |" for name, size in whole.items())]
    if "milliseconds_of_a_call" not in results:  # those of an older run
        return lines
    lines += ["", f"Milliseconds of a call, on {results['cpu']}, {results['threads']} threads, torch {results['torch']}:", ""]
    lines += ['| | package | `backend="kbit"` | packed modules in eager |', "|---|---:|---:|---:|"]
    for length, times in results["milliseconds_of_a_call"].items():
        lines.append(f"| {length} | " + " | ".join(f"{times[name]:.1f}" for name in ("package", "backend", "eager")) + " |")
    return lines


def milliseconds(model: Any, package: Path) -> dict[str, dict[str, float]]:
    """The median time of a call of each length, without a cache of keys and values: of the package, of the compiled model, and of
    the packed modules as they are. They take turns, so that what else the machine does hits all alike."""
    calls = {
        "package": torch._inductor.aoti_load_package(str(package)),
        "backend": torch.compile(model, backend="kbit", dynamic=True),
        "eager": model,
    }
    found: dict[str, dict[str, float]] = {}
    for length in LENGTHS:
        ids = torch.arange(length)[None]
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for repeat in range(REPEATS + 1):
            for name, call in calls.items():
                elapsed = timed(call, input_ids=ids, use_cache=False)[1]
                seconds[name] += [elapsed] * (repeat > 0)
        found[f"{length} tokens"] = {name: round(1000 * statistics.median(each), 2) for name, each in seconds.items()}
    return found


def build(folder: Path) -> Path:
    """The example in C++."""
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    subprocess.run([CMAKE, "-S", HERE.parent / "examples" / "cpp", "-B", folder, prefix], check=True, capture_output=True)
    subprocess.run([CMAKE, "--build", folder], check=True, capture_output=True)
    return folder / "generate"


def run(program: Path, package: Path, ids: list[int]) -> tuple[list[int], dict[str, int]]:
    """Tokens, and the program's memory in bytes by the names of /proc/self/status."""
    command = [program, package, str(NEW_TOKENS), *map(str, ids)]
    tokens, memory = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    fields = memory.replace(" kB", "").split()
    return list(map(int, tokens.split())), {field.split(":")[0]: 1024 * int(field.split(":")[1]) for field in fields}


if __name__ == "__main__":
    main()

"""SmolLM2-135M as an exported package, run by the example in C++: sizes, memory, and whether the tokens are the model's.

``.venv/bin/python benchmarks/package.py`` takes some minutes and writes ``benchmarks/results/package.json``. The weights are those
of the GGUF file, code by code. The memory is that of a process without Python.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import smollm2
import torch
from rich.console import Console

import kbit_inductor as kbit
from kbit_inductor.models.surgery import packed_matrices

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "package.json"
PROMPT = "Gravity is"
NEW_TOKENS = 16


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
        sizes = {"package": package.stat().st_size, "kernels": (folder / "libkbit.so").stat().st_size}
    for _ in range(NEW_TOKENS):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], 1)
    results = {
        "torch": torch.__version__,
        "export_seconds": round(seconds, 1),
        "bytes": {
            "gguf": file.stat().st_size,
            "packed weights": sum(matrix.packed.nbytes for matrix in packed_matrices(model)),
            "float32 weights": sum(4 * matrix.rows * matrix.columns for matrix in packed_matrices(model)),
            **sizes,
        },
        "memory": memory,
        "text": tokenizer.decode(tokens),
        "tokens_are_the_models": tokens == ids[0, -NEW_TOKENS:].tolist(),
    }
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    Console().print(results)


def build(folder: Path) -> Path:
    """The example in C++."""
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    subprocess.run(["cmake", "-S", HERE.parent / "examples" / "cpp", "-B", folder, prefix], check=True, capture_output=True)
    subprocess.run(["cmake", "--build", folder], check=True, capture_output=True)
    return folder / "generate"


def run(program: Path, package: Path, ids: list[int]) -> tuple[list[int], dict[str, int]]:
    """Tokens, and the program's memory in bytes by the names of /proc/self/status."""
    command = [program, package.parent / "libkbit.so", package, str(NEW_TOKENS), *map(str, ids)]
    tokens, memory = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    fields = memory.replace(" kB", "").split()
    return list(map(int, tokens.split())), {field.split(":")[0]: 1024 * int(field.split(":")[1]) for field in fields}


if __name__ == "__main__":
    main()

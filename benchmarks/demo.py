"""The demo: SmolLM2-135M in float32, by Inductor, and with weights of 8 to 2 bits. ``make demo`` runs it.

Every row is measured by a process of its own (:mod:`measure`), one after the other, so that its memory is its own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import report
import smollm2
import torch
import transformers
from measure import cpu_name
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from kbit_inductor.kernels.cpu import build

HERE = Path(__file__).resolve().parent
OUTPUT = HERE.parent / "demo-output"
PAGE = HERE.parent / "docs" / "demo.md"
MODEL = "SmolLM2-135M-Instruct"


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse(arguments)
    console = Console()
    if options.docs:
        report.write(json.loads((options.output / "results.json").read_text(encoding="utf-8")), PAGE)
        return
    with tempfile.TemporaryDirectory(prefix="kbit-demo-") as folder:
        results = run(options, Path(folder), console)
    options.output.mkdir(parents=True, exist_ok=True)
    show(results, console)
    for path in (report.write_json(results, options.output), report.write_picture(results, options.output)):
        console.print(f"wrote {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}", soft_wrap=True)


def run(options: argparse.Namespace, folder: Path, console: Console) -> dict[str, Any]:
    """Measure every row, with the model and the caches in ``folder``."""
    smollm2.silence()
    variants = ["eager", "inductor", *options.bits]
    progress = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console, transient=True
    )
    seconds = {}
    start = time.perf_counter()
    with progress:
        task = progress.add_task("building the CPU kernels", total=len(variants))
        seconds["kernels"] = _seconds(build.build)
        progress.update(task, description=f"reading {MODEL} (half a minute)")
        begin = time.perf_counter()
        tokenizer, inputs = prepare(options, folder)
        seconds["reading"] = time.perf_counter() - begin
        rows = []
        for variant in variants:
            begin = time.perf_counter()
            rows.append(measure_apart(folder, variant, options.whole, _describe(progress, task, report.name(variant))))
            seconds[variant] = time.perf_counter() - begin
            progress.console.print(f"{report.name(variant)}: measured in {seconds[variant]:.0f} s")
            progress.advance(task)
    seconds["all"] = time.perf_counter() - start
    texts = [text_of(row["generated"], tokenizer) for row in rows]
    return gather([row | {"text": text} for row, text in zip(rows, texts, strict=True)], inputs, seconds, options.whole)


def prepare(options: argparse.Namespace, folder: Path) -> tuple[PreTrainedTokenizerBase, smollm2.Inputs]:
    """Put model and inputs where the measuring processes find them."""
    model, tokenizer = smollm2.read_package()
    inputs = smollm2.tokenize(tokenizer, options.tokens, options.window, options.new_tokens)
    smollm2.save(folder, model, inputs)
    return tokenizer, inputs


def measure_apart(
    folder: Path, variant: str, whole: bool = False, say: Callable[[str], None] = lambda phase: None
) -> dict[str, Any]:
    """The row ``variant``, measured by a new process; ``say`` is told what the process is at."""
    environment = {
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "PYTHONWARNINGS": "ignore",
    }
    command = [sys.executable, str(HERE / "measure.py"), str(folder), variant, *(["whole"] if whole else [])]
    row = None
    with tempfile.TemporaryFile("w+") as errors:
        pipes = {"stdout": subprocess.PIPE, "stderr": errors, "text": True}
        with subprocess.Popen(command, env={**os.environ, **environment}, **pipes) as process:  # type: ignore[call-overload]
            for line in process.stdout:
                told = json.loads(line) if line.startswith("{") else {}
                say(told.get("phase", ""))
                row = told.get("row", row)
        if process.returncode or row is None:
            errors.seek(0)
            raise SystemExit(f"measuring {report.name(variant)} failed:\n{errors.read()}")
    return dict(row)


def gather(rows: list[dict[str, Any]], inputs: smollm2.Inputs, seconds: dict[str, float], whole: bool = False) -> dict[str, Any]:
    """All that the report needs, as it stands in ``results.json``."""
    return {
        "model": MODEL,
        "machine": {
            "cpu": cpu_name(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "protocol": {
            "text": smollm2.TEXT.name,
            "text_tokens": len(inputs.text),
            "window": inputs.window,
            "stride": inputs.window,
            "prompt": smollm2.PROMPT,
            "prompt_tokens": len(inputs.prompt),
            "new_tokens": inputs.new_tokens,
            "compiled": "whole" if whole else "by layers",
        },
        "seconds": seconds,
        "rows": rows,
    }


def show(results: dict[str, Any], console: Console) -> None:
    """Print the table, its notes and what each row wrote."""
    console.print(report.table(results))
    for note in report.notes(results):
        console.print(f"• {note}", style="dim", highlight=False)
    texts = Table(title=f"“{results['protocol']['prompt']}”", show_lines=True)
    texts.add_column("", no_wrap=True)
    texts.add_column(f"the first {results['protocol']['new_tokens']} tokens")
    for row in results["rows"]:
        texts.add_row(report.name(row["variant"]), row["text"])
    console.print(texts)
    console.print(f"{results['seconds']['all']:.0f} s in all")


def text_of(tokens: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """``tokens`` up to the end of the answer, as text."""
    end = tokens.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in tokens else len(tokens)
    return str(tokenizer.decode(tokens[:end])).strip()


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", type=_bits, default=_bits("8,6,5,4,3,2"), help="rows to measure (default: 8,6,5,4,3,2)")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of text for perplexity (default: 2048)")
    parser.add_argument("--window", type=int, default=512, help="tokens of one window (default: 512)")
    parser.add_argument("--new-tokens", type=int, default=40, help="tokens to generate (default: 40)")
    parser.add_argument("--whole", action="store_true", help="compile the model as one graph, a minute or more for each row")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder for results.json and bits.png")
    parser.add_argument("--docs", action="store_true", help="measure nothing; write the results there are into docs/demo.md")
    return parser.parse_args(arguments)


def _bits(text: str) -> list[str]:
    bits = [part.strip() for part in text.split(",")]
    if not all(part in list("12345678") for part in bits):
        raise argparse.ArgumentTypeError("give numbers from 1 to 8, separated by commas")
    return bits


def _describe(progress: Progress, task: Any, what: str) -> Callable[[str], None]:
    return lambda phase: progress.update(task, description=f"{what}: {phase}")


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()

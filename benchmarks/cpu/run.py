"""CPU benchmarks against other libraries; ``make bench-cpu`` runs them.

Writes ``benchmarks/results/cpu.json`` after each part, prints tables, and draws ``docs/cpu-layers.png`` and
``docs/cpu-decode.png``. ``--docs`` measures nothing and writes the tables of the results that are there into
``docs/benchmarks.md``, ``--readme`` the language model's into ``README.md``. ``--json``, ``--pictures`` and ``--document``
name other files, for another machine.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])  # benchmarks/, where the package cpu is

import torch  # noqa: E402 (see above)
from rich.console import Console  # noqa: E402

from cpu import breakdown, ceilings, layers, minilm, models, ours, peers, plots, tables  # noqa: E402
from cpu.timing import Budget, Say  # noqa: E402

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "benchmarks" / "results" / "cpu.json"
WIDTH = 160  # of the tables in a file
PACKAGES = ("torch", "onnxruntime", "llama-cpp-python", "transformers")
Results = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse(arguments)
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # else a row that ran in eager would pass for a compiled one
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH
    if options.docs or options.readme:
        results = json.loads(options.json.read_text(encoding="utf-8"))
        if options.docs:
            tables.write(tables.report(results, options.document.parent), options.document)
        if options.readme:
            tables.write(tables.summary(results), REPOSITORY / "README.md")
        return
    results = run(options, console)
    for grid in tables.grids(results):
        console.print(tables.drawn(grid))
        for note in grid.notes:
            console.print(f"• {note}", style="dim", highlight=False)
    for path in draw(results, options.pictures):
        console.print(f"wrote {path}", soft_wrap=True)


def run(options: argparse.Namespace, console: Console) -> Results:
    """Measure the chosen parts; the others stay as an earlier run left them."""
    before = json.loads(options.json.read_text(encoding="utf-8")) if options.json.exists() else {}
    results: Results = before if before.get("quick") == options.quick else {}
    results |= {"quick": options.quick, "machine": machine()}
    for part in options.only:
        with console.status(part) as status:
            results[part] = PARTS[part](options, lambda what, status=status, part=part: status.update(f"{part}: {what}"))
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        console.print(f"{part}: measured")
    return results


def draw(results: Results, folder: Path) -> list[Path]:
    """The pictures of the parts that are there."""
    written = []
    if results.get("layers", {}).get("rows"):
        written.append(plots.layers(results, folder / "cpu-layers.png"))
    if results.get("breakdown", {}).get("rows"):
        written.append(plots.decode(results, folder / "cpu-decode.png"))
    return written


def machine() -> Results:
    """The machine, and the releases of what is compared."""
    return {
        "cpu": _cpu(), "instruction_set": ours.instruction_set(), "threads": torch.get_num_threads(),
        "python": platform.python_version(), "versions": _versions(),
    }  # fmt: skip


@torch.no_grad()
def _ceilings(options: argparse.Namespace, say: Say) -> Results:
    size = {"size": 16 << 20, "width": 256} if options.quick else {}
    return ceilings.measure(Budget(0.2 if options.quick else 10, rounds=3 if options.quick else 15), **size)


@torch.no_grad()
def _layers(options: argparse.Namespace, say: Say) -> Results:
    if options.quick:
        contenders = [*peers.contenders(), *ours.contenders(bits=range(4, 5))]
        return layers.measure(layers.QUICK, contenders, Budget(0.2, rounds=1, turn=0.001), say)
    return layers.measure(layers.LAYERS, [*peers.contenders(), *ours.contenders()], Budget(options.seconds, rounds=5), say)


def _smollm2(options: argparse.Namespace, say: Say) -> Results:
    with _model(options, say) as folder:
        rows = ["eager-float32", "kbit-4"] if options.quick else models.variants(options.bits)
        found = models.measure(folder, rows, 1 if options.quick else options.repeats, say)
    return {"model": "a tiny Llama of random weights" if options.quick else "SmolLM2-135M-Instruct", **found}


def _minilm(options: argparse.Namespace, say: Say) -> Results:
    if options.quick:
        makers: list[Any] = [_eager, lambda encoder: minilm.kbit_rows(encoder, bits=(4,))]
        return minilm.measure(minilm.tiny(), makers, [(1, 16)], Budget(0.2, rounds=1), say)
    encoder = minilm.read()
    makers = [minilm.torch_rows, minilm.onnx_rows, minilm.kbit_rows]
    found = minilm.measure(encoder, makers, minilm.SHAPES, Budget(options.seconds, rounds=5), say)
    if not options.stsb or not options.stsb.is_file():
        return found | {"spearman_missing": f"no file {options.stsb}; give one by --stsb" if options.stsb else "give --stsb FILE"}
    return found | {"spearman": minilm.similarity(encoder, minilm.read_pairs(options.stsb), say)}


def _eager(encoder: minilm.Encoder) -> dict[str, minilm.Encode]:
    return {"eager-float32": encoder}


def _breakdown(options: argparse.Namespace, say: Say) -> Results:
    with _model(options, say) as folder:
        asked = models.protocol(folder, repeats=1)
        return breakdown.measure(folder, (4,) if options.quick else (4, 8), asked.prompt, 8 if options.quick else 32, say)


@contextlib.contextmanager
def _model(options: argparse.Namespace, say: Say) -> Iterator[Path]:
    """A folder with the model that is measured: the cached one, or for --quick a tiny one that goes afterwards."""
    if options.quick:
        with tempfile.TemporaryDirectory(prefix="kbit-bench-") as folder:
            models.prepare_tiny(Path(folder))
            yield Path(folder)
    else:
        models.prepare(options.cache, say)
        yield options.cache


PARTS: dict[str, Callable[[argparse.Namespace, Say], Results]] = {
    "ceilings": _ceilings,
    "layers": _layers,
    "smollm2": _smollm2,
    "minilm": _minilm,
    "breakdown": _breakdown,
}


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny shapes and models, to see that all parts work: a minute or two")
    parser.add_argument("--only", type=_parts, default=list(PARTS), help=f"parts to measure, of {','.join(PARTS)}")
    parser.add_argument("--bits", type=_bits, default=[8, 6, 5, 4, 3, 2], help="bits of the whole models (default: 8,6,5,4,3,2)")
    parser.add_argument("--seconds", type=float, default=20, help="time for one row of contenders (default: 20)")
    parser.add_argument("--repeats", type=int, default=5, help="repeats on the whole models (default: 5)")
    parser.add_argument("--stsb", type=Path, help="the test file of STS-B: two sentences and a score in each line")
    parser.add_argument(
        "--cache", type=Path, default=Path(tempfile.gettempdir()) / "kbit-bench-cpu", help="folder for models, 1.5 GB"
    )
    parser.add_argument("--json", type=Path, default=RESULTS, help="file of the results")
    parser.add_argument("--pictures", type=Path, default=REPOSITORY / "docs", help="folder of the pictures")
    parser.add_argument("--docs", action="store_true", help="measure nothing; write the tables into the document")
    parser.add_argument("--readme", action="store_true", help="measure nothing; write the language model's table into README.md")
    parser.add_argument("--document", type=Path, default=REPOSITORY / "docs" / "benchmarks.md", help="file that --docs writes into")
    return parser.parse_args(arguments)


def _parts(text: str) -> list[str]:
    parts = text.split(",")
    if unknown := set(parts) - set(PARTS):
        raise argparse.ArgumentTypeError(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    return parts


def _bits(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    main()

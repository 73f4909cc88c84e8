"""The GPU benchmark, in ten minutes at most: ``make gpu``, or ``python benchmarks/gpu/run.py``.

First the tests that need a GPU; if one fails nothing is timed. Then ceilings of the machine, layers, fused epilogues, whole models,
and all configurations of a few products.
Writes ``benchmarks/results/gpu.json`` after every row, draws ``docs/gpu-layers.png``, prints tables.

``--rehearse`` runs all of it on a CPU, on tiny shapes and by a clock that tells no time, to see that a run would end and write its
file. Its figures are marked as such and never written among the results.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

# benchmarks/, where the package gpu is, in place of this folder
sys.path[0] = str(Path(__file__).resolve().parents[1])
os.environ.setdefault("TQDM_DISABLE", "1")

import torch  # noqa: E402 (see above)
from rich.console import Console  # noqa: E402

from gpu import configurations, contenders, epilogue, heatmap, layers, machine, models, suite, tables, targets  # noqa: E402
from gpu.clock import CudaClock, RehearsalClock  # noqa: E402
from gpu.session import Session  # noqa: E402
from kbit_inductor.testing.without_gpu import operators_on_cpu  # noqa: E402

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "benchmarks" / "results"
MINUTES = 9.0
# Part to its share of the time that is left when it begins. What one does not use is left to the next.
SHARES = {"tests": 0.3, "layers": 0.45, "epilogue": 0.1, "models": 0.65, "configurations": 0.5, "peers": 1.0}
BITS = (4, 2, 3, 8, 1, 5, 6, 7)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; 1 where a test failed or no GPU is there."""
    options = _parse(arguments)
    console = Console() if sys.stdout.isatty() else Console(width=160)
    if not options.rehearse and not torch.cuda.is_available():
        console.print("torch sees no GPU. To see what a run would do: --rehearse")
        return 1
    session = _session(options, console)
    with console.status("") as status:
        session.say = lambda what: status.update(f"{session.part}: {what}")
        passed = measure(session, options.only)
    session.note(seconds=time.monotonic() - session.results.pop("begun"))
    if session.rehearsal:
        console.rule("rehearsal: nothing was measured, the figures mean nothing")
    else:
        session.note(targets=targets.judged(session.results))
    for table in tables.tables(session.results):
        console.print(table)
    console.print(f"wrote {session.file}", soft_wrap=True)
    if picture := heatmap.draw(session.results, options.picture):
        console.print(f"wrote {picture}", soft_wrap=True)
    if not passed:
        console.print("tests that need a GPU failed, or all were skipped, so nothing was timed", style="bold")
    return 0 if passed else 1


def _session(options: argparse.Namespace, console: Console) -> Session:
    device = torch.device("cpu" if options.rehearse else "cuda:0")
    begun = time.monotonic()
    session = Session(device, RehearsalClock() if options.rehearse else CudaClock(), options.json, begun + 60 * options.minutes)
    if options.tune:
        os.environ["KBIT_TUNE"] = "1"
    session.note(rehearsal=session.rehearsal, tuned=options.tune, machine=machine.describe(device), begun=begun)
    return session


@torch.no_grad()
def measure(session: Session, only: Sequence[str]) -> bool:
    """All parts that are asked for; whether the tests let it."""
    if "tests" in only:
        session.begin("tests", SHARES["tests"])
        if not suite.run(session):
            return False
    found = machine.ceilings(session.device, session.clock)
    session.note(ceilings=machine.as_json(found))
    ours = [contenders.floats(), *map(contenders.ours, BITS[:2] if session.rehearsal else BITS)]
    parts: dict[str, Callable[[], None]] = {
        "layers": lambda: layers.measure(session, ours, found),
        "epilogue": lambda: _epilogue(session),
        "models": lambda: models.measure_all(session, found),
        "configurations": lambda: configurations.measure(session),
        "peers": lambda: _peers(session, found),
    }
    for part, run in parts.items():
        if part in only:
            session.begin(part, SHARES[part])
            run()
    return True


def _epilogue(session: Session) -> None:
    if not session.rehearsal:
        epilogue.measure(session)
        return
    with operators_on_cpu():
        epilogue.measure(session)


def _peers(session: Session, found: machine.Ceilings) -> None:
    """Other libraries on the same layers; their rows join those of the part ``layers``."""
    layers.measure(session, contenders.peers(), found)
    if "layers" in session.results:
        session.results["layers"]["rows"] += session.results["peers"]["rows"]
        session.results["peers"]["rows"] = []
        session.write()


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with tiny shapes and without a clock")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"time for all parts together (default: {MINUTES:g})")
    parser.add_argument("--only", type=_parts, default=list(SHARES), help=f"parts to run, of {','.join(SHARES)}")
    parser.add_argument("--tune", action="store_true", help="tune each shape at its first launch, two seconds each")
    parser.add_argument("--json", type=Path, help="file of the results (default: benchmarks/results/gpu.json)")
    parser.add_argument("--picture", type=Path, help="the heat map (default: docs/gpu-layers.png)")
    options = parser.parse_args(arguments)
    scratch = Path(tempfile.gettempdir()) / "kbit-gpu-rehearsal"
    options.json = options.json or (scratch / "gpu.json" if options.rehearse else RESULTS / "gpu.json")
    options.picture = options.picture or (scratch if options.rehearse else REPOSITORY / "docs") / "gpu-layers.png"
    if options.rehearse and RESULTS in options.json.resolve().parents:
        parser.error("a rehearsal measures nothing, so its file does not go among the results; give --json another place")
    return options


def _parts(text: str) -> list[str]:
    parts = text.split(",")
    if unknown := set(parts) - set(SHARES):
        raise argparse.ArgumentTypeError(f"no part {', '.join(sorted(unknown))}; there are {', '.join(SHARES)}")
    return parts


if __name__ == "__main__":
    sys.exit(main())

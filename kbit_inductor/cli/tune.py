"""``kbit tune``: measure on a GPU, and take measured times from one machine to another."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from kbit_inductor.cli.files import open_model
from kbit_inductor.cli.options import EXAMPLE_TOKENS, Json, Options, config_of, console, reported
from kbit_inductor.errors import InvalidOptionError
from kbit_inductor.launches import launches
from kbit_inductor.lowering.tuner.tune import LIMIT
from kbit_inductor.progress import Progress
from kbit_inductor.tuning import ROWS, TunedShape, export_times, gpu_of, import_times
from kbit_inductor.tuning import tune as measure

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def tune(
    source: Annotated[Path | None, typer.Argument(help="A model whose products are measured.", show_default=False)] = None,
    option: Options = None,
    rows: Annotated[list[int] | None, typer.Option(help=f"Rows of x, by default {', '.join(map(str, ROWS))}.")] = None,
    device: Annotated[str, typer.Option(help="A GPU of this machine.")] = "cuda",
    dtype: Annotated[str, typer.Option(help="Of the activations.")] = "bfloat16",
    limit: Annotated[float, typer.Option(help="Seconds for each shape.")] = LIMIT,
    exhaustive: Annotated[bool, typer.Option(help="Measure all configurations, not the short list.")] = False,
    export: Annotated[Path | None, typer.Option(help="A folder to write all measured times to.", show_default=False)] = None,
    from_: Annotated[Path | None, typer.Option("--import", help="Times to take over.", show_default=False)] = None,
    as_json: Json = False,
) -> None:
    """Measure the GPU kernels on the shapes of a model, two seconds each, and remember the fastest."""
    with reported(as_json):
        if source is None and export is None and from_ is None:
            raise InvalidOptionError("there is nothing to do; give a model to tune for, --export or --import")
        if dtype not in DTYPES:
            raise InvalidOptionError(f"option 'dtype' is {dtype!r}; give one of {', '.join(DTYPES)}")
        found: dict[str, Any] = {}
        if from_ is not None:
            found["imported_shapes"] = import_times(from_)
        if source is not None:
            gpu_of(device)  # told before the model is read
            config = config_of(option)
            asked = launches(open_model(source), [torch.arange(1, 1 + EXAMPLE_TOKENS)[None]], config, DTYPES[dtype])
            found["shapes"] = []
            with Progress(len(asked) * len(rows or ROWS), "tuning") as progress:
                for done in measure(asked, rows or ROWS, device, limit, exhaustive):
                    found["shapes"].append(done)
                    progress.advance(done.shape)
        if export is not None:
            found["exported_files"] = export_times(export)
        _show(found, as_json)
    if any(done.interrupted for done in found.get("shapes", [])):
        raise typer.Exit(130)


def _show(found: dict[str, Any], as_json: bool) -> None:
    measured: list[TunedShape] = found.get("shapes", [])
    if as_json:
        print(json.dumps({**found, "shapes": [dataclasses.asdict(done) for done in measured]}))
        return
    for name in found.keys() - {"shapes"}:
        console.print(f"{name.replace('_', ' ')}: {found[name]}")
    if measured:
        table = Table("shape", "tried", "fastest", "")
        for done in measured:
            fastest = "none fits" if done.seconds is None else f"{1e6 * done.seconds:.2f} µs"
            state = "interrupted" if done.interrupted else "" if done.complete else "time was up; tune again to go on"
            table.add_row(done.shape, str(done.tried), fastest, "; ".join(filter(None, (state, *done.dropped))))
        console.print(table)

"""``kbit bench``: how fast a model, or each of its layers, is on this machine."""

from __future__ import annotations

import dataclasses
import fnmatch
import itertools
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import typer
from rich.table import Column, Table
from torch import nn
from torch.utils.benchmark import Timer

from kbit_inductor.cli.files import open_model
from kbit_inductor.cli.options import Json, Options, Source, config_of, console, reported, show
from kbit_inductor.cli.text import COMPILING
from kbit_inductor.config import Config
from kbit_inductor.errors import InvalidOptionError
from kbit_inductor.generation.generator import Generator
from kbit_inductor.models.modules import PackedLinear
from kbit_inductor.models.surgery import quantize_
from kbit_inductor.progress import waiting

Pattern = Annotated[
    str | None,
    typer.Option("--layers", help="Time layers of these names in place of the model: '*' for all.", show_default=False),
]


@dataclass(frozen=True)
class LayerTime:
    """How long one product takes, the median of many.

    Attributes:
        name: of the layer.
        shape: ``[N, K]`` of its weight.
        bits: of its codes.
        rows: of the input.
        microseconds: of the packed layer.
        float_microseconds: of ``nn.Linear`` on the float weight.
        gigabytes_per_second: packed bytes read in that time.
    """

    name: str
    shape: tuple[int, int]
    bits: int
    rows: int
    microseconds: float
    float_microseconds: float
    gigabytes_per_second: float


def bench(
    source: Source,
    layers: Pattern = None,
    rows: Annotated[list[int] | None, typer.Option(help="Rows of a layer's input; several times for several.", min=1)] = None,
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt.", min=1)] = 128,
    new_tokens: Annotated[int, typer.Option(help="Tokens that are written after it.", min=2)] = 32,
    option: Options = None, as_json: Json = False,
) -> None:  # fmt: skip
    """Time a model here: a prompt and what follows it; or, with --layers, each product alone beside that on floats."""
    with reported(as_json):
        config = config_of(option)
        model = open_model(source)
        if layers is None:
            show(text_speed(model, config, prompt, new_tokens), as_json)
            return
        found = list(layer_times(quantize_(model, config), layers, rows or [1, 16]))
        if not found:
            raise InvalidOptionError(f"no packed layer has a name like {layers!r}; see kbit explain for the names")
        if as_json:
            print(json.dumps([dataclasses.asdict(each) for each in found]))
        else:
            _print(found)


def text_speed(model: nn.Module, config: Config, prompt: int, new_tokens: int) -> dict[str, Any]:
    """Tokens per second of the prompt and after it, of the compiled model, when all is compiled."""
    generator = Generator(model, prompt + new_tokens, config)
    ids = torch.arange(prompt)[None] % generator.model.config.vocab_size
    with waiting(COMPILING):
        list(generator.stream(ids, 2, eos_token_id=()))
    times = [time.perf_counter()]
    times += [time.perf_counter() for _ in generator.stream(ids, new_tokens, eos_token_id=())]
    steps = [after - before for before, after in itertools.pairwise(times[1:])]
    return {
        "prompt_tokens_per_second": round(prompt / (times[1] - times[0]), 1),
        "tokens_per_second": round(1 / statistics.median(steps), 1),
        "threads": torch.get_num_threads(),
    }


@torch.no_grad()
def layer_times(model: nn.Module, pattern: str, rows: list[int], seconds: float = 0.1) -> Iterator[LayerTime]:
    """Every packed product of ``model`` whose name fits ``pattern``, timed for at least ``seconds`` with each number of rows."""
    for name, layer in model.named_modules():
        if isinstance(layer, PackedLinear) and fnmatch.fnmatch(name, pattern):
            matrix: Any = layer.weight
            dense = nn.Linear(matrix.columns, matrix.rows, bias=False, dtype=matrix.dtype, device=matrix.device)
            for count in rows:
                x = torch.randn(count, matrix.columns, dtype=matrix.dtype, device=matrix.device)
                packed, floats = (_median(each, x, seconds) for each in (layer, dense))
                shape = (matrix.rows, matrix.columns)
                speed = matrix.packed.nbytes / packed / 1e9
                yield LayerTime(name, shape, matrix.config.bits, count, packed * 1e6, floats * 1e6, speed)


def _median(layer: nn.Module, x: torch.Tensor, seconds: float) -> float:
    """Seconds of a call, with as many threads as torch has."""
    timer = Timer("layer(x)", globals={"layer": layer, "x": x}, num_threads=torch.get_num_threads())
    return float(timer.blocked_autorange(min_run_time=seconds).median)


def _print(found: list[LayerTime]) -> None:
    table = Table(Column("layer", overflow="fold"), "N x K", "bits", "rows", "µs", "float µs", "GB/s")
    for each in found:
        size = f"{each.shape[0]} x {each.shape[1]}"
        figures = (f"{each.microseconds:.1f}", f"{each.float_microseconds:.1f}", f"{each.gigabytes_per_second:.2f}")
        table.add_row(each.name, size, str(each.bits), str(each.rows), *figures)
    console.print(table)

"""``kbit scaling``: how the loss of a family of models moves with size and bits."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from kbit_inductor.cli.files import need_tokenizer, open_model
from kbit_inductor.cli.options import Json, console, reported
from kbit_inductor.errors import InvalidOptionError
from kbit_inductor.scaling import scaling as study_of

Sources = Annotated[list[Path], typer.Argument(help="Folders of float models, of three sizes or more.", show_default=False)]
Target = Annotated[
    Path, typer.Option(help="The folder for points and results; a run that was interrupted goes on.", show_default=False)
]


def scaling(
    sources: Sources,
    text: Annotated[Path, typer.Option(help="The text file to predict.", show_default=False)],
    output: Target,
    bits: Annotated[str, typer.Option(help="Bits of codes, three different ones or more.")] = "2,3,4,5,6,8",
    group_sizes: Annotated[str, typer.Option(help="Columns that share a scale.")] = "64",
    codebooks: Annotated[str, typer.Option(help="Values of the option codebook.")] = "uniform",
    quantizers: Annotated[str, typer.Option(help="Values of the option quantizer.")] = "clip",
    length: Annotated[int, typer.Option(help="Tokens of a window of the text.", min=2)] = 256,
    windows: Annotated[int, typer.Option(help="Windows of the text, at most.", min=1)] = 32,
    as_json: Json = False,
) -> None:
    """Fit how loss moves with size and bits of a family of models, and say which bits are best at each size."""
    with reported(as_json):
        numbers = {"bits": _integers("bits", bits), "group_sizes": _integers("group_sizes", group_sizes)}
        words = {"codebooks": codebooks.split(","), "quantizers": quantizers.split(",")}
        loaders = {source.name: functools.partial(open_model, source) for source in sources}
        study = study_of(loaders, windows_of(sources, text, length, windows), output, **numbers, **words)  # type: ignore[arg-type]
        written = [str(path) for path in study.write(output)]
        if as_json:
            print(json.dumps({"laws": [dataclasses.asdict(law) for law in study.laws], "written": written}))
        else:
            console.print(study, *(f"wrote {path}" for path in written), sep="\n", soft_wrap=True)


def windows_of(sources: Sequence[Path], text: Path, length: int, count: int) -> Tensor:
    """The first ``count`` windows of ``length`` tokens of a text file that do not overlap, int64 ``[windows, length]``.

    Raises:
        InvalidOptionError: a model without a tokenizer, models whose tokenizers differ, or a text of less than a window.
    """
    # A token is at least a byte; the rest of a long file need not be read.
    with text.open(encoding="utf-8") as file:
        read = file.read(16 * length * count)
    ids: list[int] = []
    for source in sources:
        found = list(need_tokenizer(source)(read, verbose=False)["input_ids"])[: length * count]
        if source != sources[0] and found != ids:
            raise InvalidOptionError(f"{source} and {sources[0]} have different tokenizers, so their losses do not compare")
        ids = found
    if len(ids) < length:
        raise InvalidOptionError(f"{text} has {len(ids)} tokens, less than a window of {length}; give a smaller --length")
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


def _integers(option: str, given: str) -> list[int]:
    try:
        return [int(number) for number in given.split(",")]
    except ValueError:
        raise InvalidOptionError(f"option {option!r} is {given!r}; give numbers with commas between them") from None

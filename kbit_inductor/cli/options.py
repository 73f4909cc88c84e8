"""What the subcommands of ``kbit`` share: arguments, options, and how results and mistakes are shown."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from kbit_inductor.config import Config
from kbit_inductor.errors import InvalidOptionError, KbitError

console = Console()
EXAMPLE_TOKENS = 8  # of a text that a model is run on where any will do

Source = Annotated[Path, typer.Argument(help="A folder written by kbit or by Hugging Face, or a .gguf file.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print the result, or the error, as JSON.")]
Options = Annotated[
    list[str] | None,
    typer.Option("--option", "-o", help="An option of docs/options.md as NAME=VALUE, in JSON or as a word: -o bits=3."),
]


@contextlib.contextmanager
def reported(as_json: bool) -> Iterator[None]:
    """Mistakes as a line on stderr, or as JSON on stdout, and an exit code."""
    try:
        yield
    except (KbitError, OSError) as error:
        if as_json:
            print(json.dumps({"error": str(error), "kind": type(error).__name__}))
        else:
            print(f"kbit: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        print("kbit: interrupted; nothing is left half written", file=sys.stderr)
        raise typer.Exit(130) from None


def config_of(options: list[str] | None) -> Config:
    """The options that were given as ``NAME=VALUE``.

    Raises:
        InvalidOptionError, UnknownOptionError: one that is not of that form, or that there is not.
    """
    given = {}
    for option in options or []:
        name, equals, value = option.partition("=")
        if not equals:
            raise InvalidOptionError(f"--option {option!r} is not NAME=VALUE; write bits=3 for one")
        try:
            given[name] = json.loads(value)
        except ValueError:
            given[name] = value
    return Config.from_options(given)


def show(found: dict[str, Any], as_json: bool) -> None:
    """Print ``found``, as JSON or as a table."""
    if as_json:
        print(json.dumps(found))
        return
    table = Table(show_header=False)
    for name, value in found.items():
        table.add_row(name.replace("_", " "), f"{value:,}" if isinstance(value, (int, float)) else str(value))
    console.print(table)

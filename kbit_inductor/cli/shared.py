"""What the subcommands share: options, and how mistakes are told."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from typing import Annotated

import typer

from kbit_inductor.config import Config
from kbit_inductor.errors import InvalidOptionError, KbitError

EXAMPLE_TOKENS = 8  # of a prompt that explain runs the model on

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


def options_of(options: list[str] | None) -> Config:
    """The config that ``--option NAME=VALUE`` asks for.

    Raises:
        InvalidOptionError: one that is not so written, or as :meth:`Config.from_options`.
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

"""``kbit chat``: talk to a model line by line."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from torch import Tensor

from kbit_inductor.cli.files import need_tokenizer, open_model
from kbit_inductor.cli.options import Options, Source, config_of, reported
from kbit_inductor.cli.text import pieces
from kbit_inductor.errors import InvalidOptionError
from kbit_inductor.generation.generator import Generator

System = Annotated[str | None, typer.Option(help="What the model is told before all.", show_default=False)]


def chat(
    source: Source,
    system: System = None,
    max_length: Annotated[int, typer.Option(help="Tokens that the model remembers.", min=16)] = 2048,
    temperature: Annotated[float, typer.Option(help="0 for the most likely token.")] = 0.7,
    seed: Annotated[int | None, typer.Option(help="Makes drawing repeatable.", show_default=False)] = None,
    option: Options = None,
) -> None:
    """Talk to a model with a chat template: each line is answered, until the end of the input (Ctrl-D)."""
    with reported(False):
        tokenizer = need_tokenizer(source)
        if not getattr(tokenizer, "chat_template", None):
            raise InvalidOptionError(f"the tokenizer of {source} has no chat template; use kbit generate")
        generator = Generator(open_model(source), max_length, config_of(option))
        messages = [] if system is None else [{"role": "system", "content": system}]
        for line in _lines():
            messages.append({"role": "user", "content": line})
            tokens: list[int] = []
            stream = generator.stream(_prompt(tokenizer, messages, max_length), temperature=temperature, seed=seed)
            for piece in pieces(stream, tokenizer, tokens):
                print(piece, end="", flush=True)
            print()
            messages.append({"role": "assistant", "content": tokenizer.decode(tokens, skip_special_tokens=True)})


def _lines() -> Iterator[str]:
    """Those that are typed, without empty ones."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


def _prompt(tokenizer: Any, messages: list[dict[str, str]], max_length: int) -> Tensor:
    """The talk as token ids ``[1, tokens]``, without its oldest questions and answers where less than a quarter would be left."""
    while True:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids: Tensor = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        first = messages[0]["role"] == "system"
        if ids.shape[1] <= max_length - max_length // 4 or len(messages) <= 2 + first:
            return ids
        del messages[first : first + 2]
        print("kbit: the oldest question and its answer are forgotten (--max-length)", file=sys.stderr)

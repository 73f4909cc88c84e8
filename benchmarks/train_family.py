"""Train a family of small Llama models of several sizes on a text file, for ``kbit scaling``.

``python benchmarks/train_family.py text.txt family --sizes 64x2 128x3 192x4 256x6``: width x layers. All share a byte-level BPE
tokenizer that is trained on the same text. The end of the text is held out: ``eval.txt``. Each folder is one of Hugging Face, with
a ``training.json`` that tells parameters, tokens seen and the loss on held-out text.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HEAD = 32  # width of an attention head
HELD_OUT = 0.02  # of the text
CLIP, DECAY, PEAK, WARM = 1.0, 0.1, 3e-3, 0.05  # of gradients, of weights, of the learning rate at width 128, of the steps
END = "<|endoftext|>"


def main(arguments: Sequence[str] | None = None) -> None:
    """Train every size, one after the other; those that are there already stay."""
    options = _parse(arguments)
    console = Console()
    options.output.mkdir(parents=True, exist_ok=True)
    text = options.text.read_text(encoding="utf-8")
    cut = int(len(text) * (1 - HELD_OUT))
    (options.output / "eval.txt").write_text(text[cut:], encoding="utf-8")
    tokenizer = train_tokenizer(text[:cut], options.vocabulary)
    tokens, held_out = (torch.tensor(tokenizer(part)["input_ids"]) for part in (text[:cut], text[cut:]))
    if min(len(tokens), len(held_out)) <= options.length:
        raise SystemExit(f"{options.text} is too short: give more than {int(options.length / HELD_OUT)} tokens of text")
    for size in options.sizes:
        folder = options.output / size
        if (folder / "training.json").exists():
            console.print(f"{size} is there")
            continue
        result = train(size, tokens, held_out, options, console)
        result.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        loss = evaluate(result, held_out, options.length)
        parameters = sum(parameter.numel() for parameter in result.parameters())
        seen = options.steps * options.batch * options.length
        # The last to be written: a folder without it is of a run that was interrupted.
        (folder / "training.json").write_text(
            json.dumps({"parameters": parameters, "tokens_seen": seen, "corpus_tokens": len(tokens), "eval_loss": loss}, indent=1)
        )
        console.print(f"{size}: {parameters / 1e6:.2f} M parameters, loss {loss:.3f}")


def train_tokenizer(text: str, vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most ``vocabulary`` tokens."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(text.splitlines(keepends=True), vocab_size=vocabulary, special_tokens=[END], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token=END, eos_token=END)


def model_of(size: str, vocabulary: int, length: int) -> LlamaForCausalLM:
    """A Llama of ``size``, width x layers, with tied table and head."""
    width, layers = map(int, size.split("x"))
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary, hidden_size=width, intermediate_size=-(-width * 8 // 3 // 32) * 32, num_hidden_layers=layers,
            num_attention_heads=max(1, width // HEAD), max_position_embeddings=length, tie_word_embeddings=True,
        )
    )  # fmt: skip


def train(size: str, tokens: Tensor, held_out: Tensor, options: argparse.Namespace, console: Console) -> LlamaForCausalLM:
    """AdamW, a short warm-up, then a cosine to a tenth; wider models with a lower rate."""
    torch.manual_seed(options.seed)
    model = model_of(size, options.vocabulary, options.length).to(options.device)
    peak = PEAK * math.sqrt(128 / model.config.hidden_size)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, options.steps))
    for _ in track(range(options.steps), f"training {size}", console=console, transient=True):
        batch = batch_of(tokens, options.batch, options.length).to(options.device)
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
    return model.to("cpu").eval()


def rate(step: int, steps: int) -> float:
    """Of the peak."""
    warm = max(1, int(steps * WARM))
    if step < warm:
        return (step + 1) / warm
    return 0.1 + 0.9 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))) / 2


def batch_of(tokens: Tensor, rows: int, length: int) -> Tensor:
    """Random pieces of the text, ``[rows, length]``."""
    starts = torch.randint(len(tokens) - length, (rows,))
    return torch.stack([tokens[start : start + length] for start in starts])


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, tokens: Tensor, length: int) -> float:
    """Mean loss on windows that do not overlap."""
    windows = tokens[: len(tokens) // length * length].view(-1, 1, length)
    return sum(float(model(window, labels=window).loss) for window in windows) / len(windows)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("text", type=Path, help="any text file")
    parser.add_argument("output", type=Path, help="folder for the models")
    parser.add_argument("--sizes", nargs="+", default=["64x2", "128x3", "192x4", "256x6"], help="width x layers")
    parser.add_argument("--vocabulary", type=int, default=4096, help="tokens of the tokenizer (default: 4096)")
    parser.add_argument("--steps", type=int, default=2000, help="of the optimizer (default: 2000)")
    parser.add_argument("--batch", type=int, default=16, help="rows of a step (default: 16)")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row (default: 256)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where it is trained")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()

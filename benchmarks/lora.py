"""What LoRA recovers of the loss that packing costs: adapters that begin at zero, or at the low-rank part of the error.

``.venv/bin/python benchmarks/lora.py --model FOLDER --text FILE`` writes ``benchmarks/results/lora.json``. The beginning of the
text is trained on, its end is predicted. The float model gets an adapter too, since some of what training gives is the text's, and
no loss of packing recovered. All runs see the same batches in the same order.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from quality.measures import windows
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import kbit_inductor as kbit
from kbit_inductor.models.surgery import packed_matrices

RESULTS = Path(__file__).resolve().parent / "results" / "lora.json"
BATCH = 8  # windows


def main(arguments: Sequence[str] | None = None) -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    options = _parse(arguments)
    trained_on, predicted = texts(options)
    floats = load(options)
    state = {name: tensor.clone() for name, tensor in floats.state_dict().items()}
    calibration = kbit.calibrate(floats, trained_on[:BATCH])
    packed = kbit.quantize_(floats, {"bits": options.bits, "end_bits": 1, "group_size": options.group_size}, calibration)
    losses = {"float": loss(load(options), predicted), "packed": loss(packed, predicted)}
    runs: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "float, from zero": (load(options), ()),
        "packed, from zero": (packed, ()),
        "packed, from the error": (packed, (state,)),
        "packed, from the weighted error": (packed, (state, calibration)),
    }
    rows = {}
    for name, (base, start) in runs.items():
        rows[name] = run(base, start, trained_on, predicted, options)
        Console().print(name, rows[name])
    lost = losses["packed"] - losses["float"]
    for row in rows.values():
        row |= {f"recovered_{when}": (losses["packed"] - row[when]) / lost for when in ("start", "end")}
    results = {"protocol": protocol(options, trained_on, predicted, packed), "loss": losses, "runs": rows}
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    Console().print(results)


def load(options: argparse.Namespace) -> Any:
    return AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()


def texts(options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Windows to train on, as many as all steps take or there are, and windows to predict."""
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokens = tokenizer(options.text.read_text(encoding="utf-8"))["input_ids"]
    every = windows(tokens, options.length, len(tokens) // options.length)
    return every[: -options.predicted], every[-options.predicted :]


@torch.no_grad()
def loss(model: Any, text: Tensor) -> float:
    """Mean negative log-likelihood of every token but the first of a window, in nats."""
    return sum(float(model(part, labels=part).loss) * len(part) for part in text.split(BATCH)) / len(text)


def run(base: Any, start: tuple[Any, ...], trained_on: Tensor, predicted: Tensor, options: argparse.Namespace) -> dict[str, float]:
    """The loss before and after an adapter on a copy of ``base`` is trained."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=options.rank, lora_alpha=options.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(copy.deepcopy(base), config)
    if start:
        kbit.init_lora_(model, *start)
    before, begin = loss(model, predicted), time.perf_counter()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, options.rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    for step in range(options.steps):
        picked = torch.randint(len(trained_on), (BATCH,), generator=torch.Generator().manual_seed(step))
        model(trained_on[picked], labels=trained_on[picked]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    seconds = time.perf_counter() - begin
    return {"start": before, "end": loss(model, predicted), "seconds_per_step": seconds / max(options.steps, 1)}


def protocol(options: argparse.Namespace, trained_on: Tensor, predicted: Tensor, packed: Any) -> dict[str, Any]:
    matrices = packed_matrices(packed)
    weights = sum(matrix.rows * matrix.columns for matrix in matrices)
    return {
        "model": options.model.name,
        "text": options.text.name,
        "bits": options.bits,
        "bits_per_weight": 8 * sum(matrix.packed.nbytes for matrix in matrices) / weights,
        "rank": options.rank,
        "rate": options.rate,
        "steps": options.steps,
        "tokens_per_step": BATCH * options.length,
        "tokens_to_train_on": trained_on.numel(),
        "tokens_predicted": predicted.numel() - len(predicted),
        "torch": torch.__version__,
    }


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of a causal language model")
    parser.add_argument("--text", type=Path, required=True, help="text file")
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--rank", type=int, default=16, help="of the adapters (default: 16)")
    parser.add_argument("--rate", type=float, default=2e-3, help="of learning, at the start (default: 0.002)")
    parser.add_argument("--steps", type=int, default=100, help="of training, 8 windows each (default: 100)")
    parser.add_argument("--length", type=int, default=256, help="tokens of a window (default: 256)")
    parser.add_argument("--predicted", type=int, default=48, help="windows to predict (default: 48)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()

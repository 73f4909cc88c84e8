"""The subcommands of ``kbit``. Each exits with 0 when it is done, 1 on an error, 2 on a wrong option and 130 when interrupted."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

from kbit_inductor.bits import Plan, plan
from kbit_inductor.cli import doctor as machine
from kbit_inductor.cli.files import new_folder, open_model, open_tokenizer
from kbit_inductor.cli.shared import EXAMPLE_TOKENS, Json, Options, options_of, reported
from kbit_inductor.cli.tune import tune
from kbit_inductor.errors import InvalidOptionError
from kbit_inductor.explain import explain as explain_model
from kbit_inductor.generation.generator import Generator
from kbit_inductor.models.saving import save
from kbit_inductor.models.surgery import dequantize_, packed_matrices, quantize_

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help="k-bit models: make, look into and run them.")
app.command()(tune)
console = Console()

Source = Annotated[Path, typer.Argument(help="A folder written by kbit or by Hugging Face, or a .gguf file.", show_default=False)]
Target = Annotated[Path, typer.Argument(help="The folder to write.", show_default=False)]
Force = Annotated[bool, typer.Option("--force", help="Replace TARGET if it is there.")]
Text = Annotated[Path | None, typer.Option(help="A text file to calibrate on, one sample for each line.", show_default=False)]

Device = Annotated[
    str | None,
    typer.Option(help="Tell expected times on this device: h200, a100, cpu, cuda, …", show_default=False),
]
PlanFile = Annotated[Path | None, typer.Option("--plan", help="Bits by layer, written by kbit plan.", show_default=False)]
Output = Annotated[Path | None, typer.Option(help="Where to write the plan, for kbit quantize --plan.", show_default=False)]


@app.command()
def quantize(
    source: Source, target: Target, option: Options = None, text: Text = None,
    plan_file: PlanFile = None,
    force: Force = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Pack the weights of a model and save it."""
    with reported(as_json):
        config = options_of(option)
        if plan_file is not None:
            config = Plan.load(plan_file).apply(config)
        with new_folder(target, force) as folder:
            model, tokenizer = open_model(source), open_tokenizer(source)
            quantize_(model, config, _lines(text), tokenizer=tokenizer)
            _write(model, tokenizer, folder)
        _show(_sizes(model), as_json)


@app.command()
def convert(source: Source, target: Target, force: Force = False, as_json: Json = False) -> None:
    """Take a model over as it is, the packed weights of a GGUF file for one, and save it."""
    with reported(as_json):
        with new_folder(target, force) as folder:
            model = open_model(source)
            _write(model, open_tokenizer(source), folder)
        _show(_sizes(model), as_json)


@app.command()
def dequantize(source: Source, target: Target, force: Force = False, as_json: Json = False) -> None:
    """Write the float values of a packed model as a folder of Hugging Face."""
    with reported(as_json):
        with new_folder(target, force) as folder:
            model: Any = dequantize_(open_model(source))
            model.save_pretrained(folder)
            if (tokenizer := open_tokenizer(source)) is not None:
                tokenizer.save_pretrained(folder)
        _show(_sizes(model), as_json)


@app.command()
def explain(source: Source, option: Options = None, device: Device = None, as_json: Json = False) -> None:
    """Say what becomes of each layer, and why."""
    with reported(as_json):
        model = open_model(source)
        found = explain_model(model, torch.arange(1, 1 + EXAMPLE_TOKENS)[None], config=options_of(option), device=device)
        if as_json:
            plain = dataclasses.replace(found, fusions=dict(found.fusions))  # asdict takes a Counter apart
            print(json.dumps(dataclasses.asdict(plain)))
        else:
            console.print(found)


@app.command("plan")
def plan_bits(
    source: Source,
    output: Output = None,
    option: Options = None, text: Text = None, as_json: Json = False,
) -> None:  # fmt: skip
    """Choose bits for each layer under a budget: -o average_bits=3.5, memory_budget="90 MB" or latency_budget="2 ms"."""
    with reported(as_json):
        config = options_of(["bits=auto", *(option or [])])
        found = plan(open_model(source), config, _lines(text), tokenizer=open_tokenizer(source))
        if output is not None:
            found.save(output)
        if as_json:
            print(json.dumps(dataclasses.asdict(found)))
        else:
            console.print(found)


@app.command()
def generate(
    source: Source,
    prompt: Annotated[str, typer.Argument(help="What is continued.", show_default=False)],
    max_new_tokens: Annotated[int, typer.Option(help="At most so many tokens are written.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 for the most likely token.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Makes drawing repeatable.", show_default=False)] = None,
    option: Options = None, as_json: Json = False,
) -> None:  # fmt: skip
    """Continue a prompt, token by token, on the compiled model."""
    with reported(as_json):
        tokenizer = open_tokenizer(source)
        if tokenizer is None:
            raise InvalidOptionError(f"{source} has no tokenizer; put one there by tokenizer.save_pretrained")
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        generator = Generator(open_model(source), ids.shape[1] + max_new_tokens, options_of(option))
        tokens: list[int] = []
        shown = ""
        for token in generator.stream(ids, max_new_tokens, temperature=temperature, seed=seed):
            tokens.append(int(token[0]))
            written = tokenizer.decode(tokens, skip_special_tokens=True)
            if not as_json and not written.endswith("�"):  # the bytes of a character may come in several tokens
                print(written[len(shown) :], end="", flush=True)
                shown = written
        print(json.dumps({"text": tokenizer.decode(tokens, skip_special_tokens=True), "tokens": tokens}) if as_json else "")


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what this machine has for packed models, what is missing, and how to mend it."""
    with reported(as_json):
        found = list(machine.checks())
        if as_json:
            print(json.dumps([dataclasses.asdict(check) for check in found]))
        else:
            table = Table("", "what", "found", "to mend it", show_lines=False)
            for check in found:
                mark = "ok" if check.ok else "MISSING" if check.needed else "none"
                table.add_row(mark, check.name, check.found, "" if check.ok else check.mend)
            console.print(table)
    if any(check.needed and not check.ok for check in found):
        raise typer.Exit(1)


def _lines(text: Path | None) -> list[str] | None:
    return None if text is None else [line for line in text.read_text(encoding="utf-8").splitlines() if line.strip()]


def _write(model: nn.Module, tokenizer: Any, folder: Path) -> None:
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    save(model, folder)


def _sizes(model: nn.Module) -> dict[str, Any]:
    matrices = packed_matrices(model)
    packed = sum(matrix.packed.nbytes for matrix in matrices)
    weights = sum(matrix.rows * matrix.columns for matrix in matrices)
    floats = sum(parameter.nbytes for parameter in model.parameters())
    bits = 8 * packed / weights if weights else 0.0
    return {
        "packed_weights": len(matrices),
        "packed_bytes": packed,
        "bits_per_packed_weight": round(bits, 3),
        "float_bytes": floats,
    }


def _show(found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(found))
        return
    table = Table(show_header=False)
    for name, value in found.items():
        table.add_row(name.replace("_", " "), f"{value:,}")
    console.print(table)

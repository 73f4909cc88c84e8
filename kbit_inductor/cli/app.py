"""The subcommands of ``kbit``. Each exits with 0 when it is done, 1 on an error, 2 on a wrong option and 130 when interrupted."""

from __future__ import annotations

import dataclasses
import enum
import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Column, Table
from torch import Tensor, nn

import kbit_inductor
from kbit_inductor.bits import Plan, plan
from kbit_inductor.cli import doctor as machine
from kbit_inductor.cli.bench import bench
from kbit_inductor.cli.chat import chat
from kbit_inductor.cli.evaluate import evaluate
from kbit_inductor.cli.files import check_new, need_tokenizer, new_folder, open_model, open_tokenizer, text_of
from kbit_inductor.cli.options import EXAMPLE_TOKENS, Json, Options, Source, config_of, console, reported, show
from kbit_inductor.cli.scaling import scaling
from kbit_inductor.cli.text import pieces
from kbit_inductor.cli.tune import tune
from kbit_inductor.debug.bisect import bisect as bisect_model
from kbit_inductor.errors import ModelMismatchError
from kbit_inductor.generation.generator import Generator
from kbit_inductor.models.exporters.gguf import to_gguf
from kbit_inductor.models.exporters.gptq import to_gptq
from kbit_inductor.models.package import export
from kbit_inductor.models.saving import save
from kbit_inductor.models.surgery import dequantize_, packed_matrices, quantize_
from kbit_inductor.reports.explain import explain as explain_model

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)

Target = Annotated[Path, typer.Argument(help="The folder to write.", show_default=False)]
Force = Annotated[bool, typer.Option("--force", help="Replace TARGET if it is there.")]
Text = Annotated[Path | None, typer.Option(help="A text file to calibrate on, one sample for each line.", show_default=False)]

Device = Annotated[
    str | None,
    typer.Option(help="Tell expected times on this device: h200, a100, cpu, cuda, …", show_default=False),
]
PlanFile = Annotated[Path | None, typer.Option("--plan", help="Bits by layer, written by kbit plan.", show_default=False)]
Output = Annotated[Path | None, typer.Option(help="Where to write the plan, for kbit quantize --plan.", show_default=False)]


def _tell_version(wanted: bool) -> None:
    if wanted:
        print(f"kbit-inductor {kbit_inductor.__version__}, torch {torch.__version__}")
        raise typer.Exit()


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", help="Say which release this is.", callback=_tell_version, is_eager=True)
    ] = False,
) -> None:
    """k-bit models: make, look into and run them."""


class Form(str, enum.Enum):
    """What ``convert`` writes."""

    KBIT = "kbit"
    GGUF = "gguf"
    GPTQ = "gptq"


@app.command()
def quantize(
    source: Source, target: Target, option: Options = None, text: Text = None,
    plan_file: PlanFile = None,
    force: Force = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Pack the weights of a model and save it."""
    with reported(as_json):
        config = config_of(option)
        if plan_file is not None:
            config = Plan.load(plan_file).apply(config)
        with new_folder(target, force) as folder:
            model, tokenizer = open_model(source), open_tokenizer(source)
            quantize_(model, config, _lines(text), tokenizer=tokenizer)
            save(model, folder)
            _save_tokenizer(tokenizer, folder)
        show(_sizes(model), as_json)


@app.command()
def convert(
    source: Source, target: Target,
    to: Annotated[Form, typer.Option(help="What to write: a folder of kbit or of GPTQ, or a GGUF file.")] = Form.KBIT,
    force: Force = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Take a model over as it is, packed weights of GGUF, GPTQ, AWQ and others among them, and save it."""
    with reported(as_json):
        if to is Form.GGUF:
            check_new(target, force)
            model = open_model(source)
            to_gguf(model, target, like=source if source.suffix == ".gguf" else None)
        else:
            with new_folder(target, force) as folder:
                model = open_model(source)
                (save if to is Form.KBIT else to_gptq)(model, folder)
                _save_tokenizer(open_tokenizer(source), folder)
        show(_sizes(model), as_json)


@app.command()
def dequantize(source: Source, target: Target, force: Force = False, as_json: Json = False) -> None:
    """Write the float values of a packed model as a folder of Hugging Face."""
    with reported(as_json):
        with new_folder(target, force) as folder:
            model: Any = dequantize_(open_model(source))
            model.save_pretrained(folder)
            _save_tokenizer(open_tokenizer(source), folder)
        show(_sizes(model), as_json)


@app.command()
def explain(source: Source, option: Options = None, device: Device = None, as_json: Json = False) -> None:
    """Say what becomes of each layer, and why."""
    with reported(as_json):
        model = open_model(source)
        found = explain_model(model, _example(1), config=config_of(option), device=device)
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
        config = config_of(["bits=auto", *(option or [])])
        found = plan(open_model(source), config, _lines(text), tokenizer=open_tokenizer(source))
        if not found.layers:
            raise ModelMismatchError(
                f"{source} has no layer in float to choose bits for; of a packed model: kbit dequantize, first"
            )
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
        tokenizer = need_tokenizer(source)
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        generator = Generator(open_model(source), ids.shape[1] + max_new_tokens, config_of(option))
        tokens: list[int] = []
        for piece in pieces(generator.stream(ids, max_new_tokens, temperature=temperature, seed=seed), tokenizer, tokens):
            if not as_json:
                print(piece, end="", flush=True)
        print(json.dumps({"text": tokenizer.decode(tokens, skip_special_tokens=True), "tokens": tokens}) if as_json else "")


@app.command()
def bisect(
    source: Source,
    folder: Annotated[Path, typer.Option(help="Where a program that shows the fault is written.")] = Path("kbit-repro"),
    option: Options = None, as_json: Json = False,
) -> None:  # fmt: skip
    """Find the pass and the layer that break a model; exits with 1 when there are."""
    with reported(as_json):
        culprit = bisect_model(open_model(source), _example(1), config_of(option), folder)
        found = {"broken": culprit is not None} | ({} if culprit is None else dataclasses.asdict(culprit))
        show({name: str(value) if isinstance(value, Path) else value for name, value in found.items()}, as_json)
    if culprit is not None:
        raise typer.Exit(1)


@app.command("export")
def export_package(
    source: Source,
    target: Annotated[Path, typer.Argument(help="The package to write, a file of the name *.pt2.", show_default=False)],
    option: Options = None, as_json: Json = False,
) -> None:  # fmt: skip
    """Compile a packed model to a package that runs without Python (docs/deploy.md); with -o, packed so before."""
    with reported(as_json):
        model = open_model(source)
        if option:
            quantize_(model, config_of(option))
        export(model, {"input_ids": _example(2), "use_cache": False}, target)
        show({"package_bytes": target.stat().st_size, **_sizes(model)}, as_json)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what this machine has for packed models, what is missing, and how to mend it."""
    with reported(as_json):
        found = list(machine.checks())
        if as_json:
            print(json.dumps([dataclasses.asdict(check) for check in found]))
        else:
            table = Table(*(Column(title, overflow="fold") for title in ("", "what", "found", "to mend it")))
            for check in found:
                mark = "ok" if check.ok else "MISSING" if check.needed else "none"
                table.add_row(mark, check.name, check.found, "" if check.ok else check.mend)
            console.print(table)
    if any(check.needed and not check.ok for check in found):
        raise typer.Exit(1)


app.command("eval")(evaluate)
app.command()(chat)
app.command()(bench)
app.command()(tune)
app.command()(scaling)


def _example(batch: int) -> Tensor:
    return torch.arange(1, 1 + EXAMPLE_TOKENS).expand(batch, -1).contiguous()


def _lines(text: Path | None) -> list[str] | None:
    return None if text is None else [line for line in text_of(text).splitlines() if line.strip()]


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


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

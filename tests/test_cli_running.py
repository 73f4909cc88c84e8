"""Commands that run a model: eval, chat, bench, bisect, export; help and completion of all."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_cli import done, kbit_command, source  # noqa: F401  (a fixture)
from torch import nn
from typer.testing import CliRunner

import kbit_inductor as kbit
from kbit_inductor.cli import app as commands
from kbit_inductor.cli import chat as chatting


@pytest.fixture(autouse=True)
def _quick(one_thread_without_grad: None) -> Iterator[None]:
    yield


def test_eval_is_the_perplexity_of_whole_windows(source: Path, tmp_path: Path) -> None:  # noqa: F811
    ids = torch.randint(4, 200, (30,))
    (tmp_path / "text").write_text(" ".join(f"w{i}" for i in ids.tolist()))
    found = done("eval", source, tmp_path / "text", "--length", 8, "--windows", 2)
    model = transformers.AutoModelForCausalLM.from_pretrained(source).eval()
    windows = ids[:16].view(2, 8)
    nats = float(nn.functional.cross_entropy(model(windows).logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten()))
    assert found["nats_per_token"] == pytest.approx(nats, rel=1e-5) and found["perplexity"] == pytest.approx(
        math.exp(nats), rel=1e-4
    )
    assert (found["predicted_tokens"], found["windows"]) == (14, 2)
    assert done("eval", source, tmp_path / "text", "--length", 8)["windows"] == 3
    packed = done("eval", source, tmp_path / "text", "--length", 8, "--windows", 2, "-o", "bits=2", "-o", "min_elements=0")
    assert packed["nats_per_token"] != found["nats_per_token"]
    result = kbit_command("eval", source, tmp_path / "text")
    assert result.exit_code == 1 and "30 tokens, less than a window of 512" in result.stderr


class Echo:
    """A generator that repeats the last three tokens of its prompt."""

    def __init__(self, model: Any, max_length: int, config: kbit.Config) -> None:
        self.prompts: list[list[int]] = []
        Echo.last = self

    def stream(self, ids: torch.Tensor, *, temperature: float, seed: int | None) -> Iterator[torch.Tensor]:
        assert (temperature, seed) == (0.7, 5)
        self.prompts.append(ids[0].tolist())
        yield from ids[0, -3:, None]


TEMPLATE = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}w9 w9 w9"


def test_chat_answers_each_line_and_remembers_as_much_as_fits(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    monkeypatch.setattr(chatting, "Generator", Echo)
    result = kbit_command("chat", source)
    assert result.exit_code == 1 and "no chat template" in result.stderr
    folder = tmp_path / "model"
    transformers.AutoModelForCausalLM.from_pretrained(source).save_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    arguments = ["chat", str(folder), "--seed", "5", "--system", "w7", "--max-length", "16"]
    result = CliRunner().invoke(commands.app, arguments, input="w4 w5\n\nw6\nw8\n")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == ["w9 w9 w9"] * 3
    assert Echo.last.prompts == [[7, 4, 5, 9, 9, 9], [7, 4, 5, 9, 9, 9, 6, 9, 9, 9], [7, 6, 9, 9, 9, 8, 9, 9, 9]]
    assert "forgotten" in result.stderr


class Instant:
    """A generator that compiles nothing and computes nothing."""

    def __init__(self, model: Any, max_length: int, config: kbit.Config) -> None:
        self.model = model

    def stream(self, ids: torch.Tensor, count: int, *, eos_token_id: tuple[()]) -> Iterator[torch.Tensor]:
        yield from torch.zeros(count, 1, dtype=torch.int64)


def test_bench_times_a_model_or_its_layers(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    from kbit_inductor.cli import bench

    monkeypatch.setattr(bench, "Generator", Instant)
    found = done("bench", source, "--prompt", 7, "--new-tokens", 3)
    assert found["threads"] == 1 and min(found["prompt_tokens_per_second"], found["tokens_per_second"]) > 0
    options = ("--rows", 1, "--rows", 3, "-o", "bits=3", "-o", "min_elements=0")
    rows = done("bench", source, "--layers", "*.1.mlp.down_proj", *options)
    assert [(row["name"], row["rows"]) for row in rows] == [
        ("model.layers.1.mlp.down_proj", 1),
        ("model.layers.1.mlp.down_proj", 3),
    ]
    assert all(row["bits"] == 3 and row["microseconds"] > 0 and row["float_microseconds"] > 0 for row in rows)
    monkeypatch.setattr(bench, "_median", lambda layer, x, seconds: 12e-6)
    result = kbit_command("bench", source, "--layers", "*.mlp.*", *options)
    assert result.stdout.count("12.0") == 24 and "GB/s" in result.stdout
    result = kbit_command("bench", source, "--layers", "nothing")
    assert result.exit_code == 1 and "no packed layer has a name like 'nothing'" in result.stderr


def test_bisect_says_what_is_broken_by_its_exit_code(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    culprit = kbit.Culprit("fuse", "model.layers.0", "it moved", tmp_path / "repro.py")
    for found, code in ((None, 0), (culprit, 1)):
        monkeypatch.setattr(commands, "bisect_model", lambda model, x, config, folder, found=found: found)
        result = kbit_command("bisect", source, "--json")
        assert result.exit_code == code
        assert json.loads(result.stdout)["broken"] is (found is not None)
    assert json.loads(result.stdout)["broken_pass"] == "fuse"


def test_export_packs_and_writes_a_package(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    result = kbit_command("export", source, tmp_path / "model.pt2")
    assert result.exit_code == 1 and "no packed weight" in result.stderr
    seen = []

    def export(model: nn.Module, example: dict[str, Any], path: Path) -> None:
        seen.append(example["input_ids"].shape)
        model(**example)
        path.write_bytes(b"12345")

    monkeypatch.setattr(commands, "export", export)
    found = done("export", source, tmp_path / "model.pt2", "-o", "bits=4", "-o", "min_elements=0")
    assert found["package_bytes"] == 5 and found["packed_weights"] == 15 and seen == [(2, 8)]


def test_every_command_has_help_and_the_shell_completes_it() -> None:
    names = {command.name or command.callback.__name__ for command in commands.app.registered_commands}  # type: ignore[union-attr]
    assert {"quantize", "explain", "plan", "eval", "generate", "chat", "bench", "convert", "bisect", "export", "doctor"} <= names
    for name in names:
        result = kbit_command(name, "--help")
        assert result.exit_code == 0 and "--help" in result.output
    typed = {"_KBIT_COMPLETE": "complete_bash", "COMP_WORDS": "kbit qu", "COMP_CWORD": "1"}
    assert CliRunner().invoke(commands.app, [], prog_name="kbit", env=typed).stdout.strip() == "quantize"


INTERRUPTED = """
import os, signal, sys
import kbit_command

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupt())
kbit_command.main()
"""


@pytest.mark.parametrize("handler", ["SIG_IGN", "default_int_handler"])
def test_ctrl_c_while_torch_is_loaded(handler: str) -> None:
    code = f"import signal\nsignal.signal(signal.SIGINT, signal.{handler})\n{INTERRUPTED}"
    done = subprocess.run([sys.executable, "-c", code, "--version"], capture_output=True, text=True)
    if handler == "SIG_IGN":
        assert done.stdout.startswith("kbit-inductor") and done.returncode == 0
    else:
        assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")

"""The command ``kbit`` on a tiny model, from a folder of Hugging Face to text."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import transformers
from click.testing import Result
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from typer.testing import CliRunner

import kbit_inductor as kbit
from kbit_inductor.cli import app as commands
from kbit_inductor.cli import doctor, files


@pytest.fixture(autouse=True)
def _quick(one_thread_without_grad: None) -> Iterator[None]:
    yield


def kbit_command(*arguments: object) -> Result:
    return CliRunner().invoke(commands.app, [str(argument) for argument in arguments])


def done(*arguments: object) -> Any:
    """What ``kbit … --json`` prints."""
    result = kbit_command(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "source"
    torch.manual_seed(0)
    models.llama(tie_word_embeddings=True).save_pretrained(folder)
    words = {f"w{i}": i for i in range(models.VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w3"))
    tokenizer.pre_tokenizer = Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


def test_from_a_folder_to_text_and_back(source: Path, tmp_path: Path) -> None:
    packed, floats = tmp_path / "packed", tmp_path / "floats"
    sizes = done("quantize", source, packed, "-o", "bits=4", "-o", "group_size=32", "-o", 'skip=["model.layers.0.mlp.down_proj"]')
    assert sizes["packed_weights"] == 14 and 4.5 < sizes["bits_per_packed_weight"] < 7  # rows and blocks are padded
    explained = done("explain", packed)
    assert sum(layer["reasons"] == ["packed by quantize_"] for layer in explained["layers"]) == 14
    assert done("dequantize", packed, floats)["packed_weights"] == 0
    ids = torch.arange(9)[None]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(floats).eval()
    torch.testing.assert_close(theirs(ids).logits, kbit.load(packed)(ids).logits)
    again = done("convert", packed, tmp_path / "again")
    assert again == sizes and torch.equal(kbit.load(tmp_path / "again")(ids).logits, kbit.load(packed)(ids).logits)


class Tokens:
    """A generator that compiles nothing: the most likely tokens of the model in eager."""

    def __init__(self, model: Any, max_length: int, config: kbit.Config) -> None:
        self.model, self.max_length, self.config = model, max_length, config

    def stream(self, ids: torch.Tensor, count: int, *, temperature: float, seed: int | None) -> Iterator[torch.Tensor]:
        assert (temperature, seed) == (0.5, 7) and self.max_length == ids.shape[1] + count and self.config.bits == 3
        for _ in range(count):
            token = self.model(ids).logits[:, -1].argmax(-1)
            ids = torch.cat([ids, token[:, None]], 1)
            yield token


def test_text_is_written_as_it_comes(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "Generator", Tokens)
    more = ("--max-new-tokens", 3, "--temperature", 0.5, "--seed", 7, "-o", "bits=3")
    found = done("generate", source, "w5 w6 w7", *more)
    assert len(found["tokens"]) == 3 and found["text"].split() == [f"w{token}" for token in found["tokens"]]
    assert kbit_command("generate", source, "w5 w6 w7", *more).stdout == found["text"] + "\n"


def test_a_plan_is_written_and_used(source: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("w4 w5 w6 w7 w8\n\nw9 w10 w11\n")
    options = ("-o", "average_bits=3.5", "-o", "group_size=32", "--text", tmp_path / "text")
    found = done("plan", source, "--output", tmp_path / "plan.json", *options)
    assert len({layer["bits"] for layer in found["layers"]}) > 1
    done("quantize", source, tmp_path / "packed", "--plan", tmp_path / "plan.json", "-o", "group_size=32")
    packed = kbit.load(tmp_path / "packed")
    wanted = kbit.Plan.load(tmp_path / "plan.json").overrides
    assert all(packed.get_submodule(name).weight.config.bits == bits["bits"] for name, bits in wanted.items())
    result = kbit_command("plan", tmp_path / "packed", "-o", "average_bits=3.5")
    assert result.exit_code == 1 and "no layer in float" in result.stderr


def test_output_for_people(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "explain_model", lambda *_, **__: kbit.Explanation((), 1, {}))
    assert "0 of 0 weight matrices packed" in kbit_command("explain", source).output
    assert "quantize" in kbit_command("--help").output
    assert kbit_command("--version").output.startswith(f"kbit-inductor {kbit.__version__}")


def test_mistakes_have_a_message_and_a_code(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    cases = {
        ("quantize", source, target, "-o", "bit=4"): "Did you mean 'bits'",
        ("quantize", source, target, "-o", "bits"): "NAME=VALUE",
        ("quantize", tmp_path, target): "neither kbit.json nor config.json",
        ("quantize", source, source): "there already",
        ("generate", tmp_path / "nowhere.gguf", "w4"): "is not there",
        ("eval", tmp_path, source): "no tokenizer",
        ("quantize", source, target, "--text", tmp_path): "not a text file",
    }
    for arguments, says in cases.items():
        result = kbit_command(*arguments)
        assert result.exit_code == 1 and says in result.stderr, result.output
        assert json.loads(kbit_command(*arguments, "--json").stdout)["error"]
    assert kbit_command("quantize", source).exit_code == 2
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("exists", [False, True])
def test_an_interrupt_leaves_nothing_half_written(
    source: Path, tmp_path: Path, exists: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "target"
    if exists:
        target.mkdir()
        (target / "old").write_text("")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "save", interrupt)
    result = kbit_command("quantize", source, target, "--force")
    assert result.exit_code == 130 and "interrupted" in result.stderr
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == ["target", "target/old"] * exists
    monkeypatch.undo()
    done("quantize", source, target, "--force")
    assert [path.name for path in tmp_path.iterdir()] == ["target"] and not (target / "old").exists()


def test_a_folder_that_cannot_be_replaced_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "old").write_text("")
    replace = Path.replace
    monkeypatch.setattr(files, "exchange", lambda one, other: False)  # as on a file system that cannot

    def interrupted(self: Path, other: Path) -> Path:
        if other == target and not self.name.endswith("-old"):
            raise KeyboardInterrupt
        return replace(self, other)

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt), files.new_folder(target, force=True):
        pass
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["target", "target/old"]


def test_doctor_tells_what_is_missing_and_the_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {check["name"]: check for check in done("doctor")}
    assert found["CPU kernels"]["ok"] and torch.ops.kbit.isa_cpu() in found["instruction set"]["found"]
    monkeypatch.setattr(doctor, "cpu_library_problem", lambda: "no C++ compiler")
    monkeypatch.setenv("CXX", "no-such-compiler")
    result = kbit_command("doctor")
    assert result.exit_code == 1
    assert "MISSING" in result.output and "no-such-compiler" in result.output and "install g++" in result.output


INTERRUPTED = {
    "quantize": ("kbit_inductor.models.modelfile.save_file", ["-o", "bits=4", "--force"]),
    "convert": ("kbit_inductor.models.modelfile.save_file", ["--force"]),
    "convert to gguf": ("kbit_inductor.models.exporters.gguf._writer", ["--to", "gguf", "--force"]),
    "dequantize": ("safetensors.torch.save_file", ["--force"]),
    "export": ("kbit_inductor.models.package.compile_package", ["-o", "bits=4"]),
}


@pytest.fixture
def _ctrl_c() -> Iterator[None]:
    """A shell that starts the tests in the background lets them ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_ctrl_c")
@pytest.mark.parametrize("case", INTERRUPTED)
def test_ctrl_c_leaves_what_was_there(case: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal comes while the new file is being written."""
    where, told = INTERRUPTED[case]
    command, name = case.split()[0], "old.pt2" if case == "export" else "old"

    def write(*arguments: object, **_: object) -> None:
        path = next(argument for argument in arguments if str(argument).startswith(str(tmp_path)))  # others are names
        Path(str(path)).write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGINT)

    (tmp_path / name).write_bytes(b"as it was")
    monkeypatch.setattr(where, write)
    if case == "dequantize":
        monkeypatch.setattr("transformers.modeling_utils.safe_save_file", write)
    result = kbit_command(command, source, tmp_path / name, *told)
    assert result.exit_code == 130, result.output
    assert "interrupted" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_bytes() == b"as it was"

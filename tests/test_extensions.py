"""The example packages of docs/extending/, installed as a user installs them: found by entry points, run, edited, run again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = {folder.name: folder for folder in sorted((REPOSITORY / "tests" / "extensions").iterdir()) if folder.is_dir()}
EDITS = {
    "kbit_tanh.py": ("return torch.tanh(x)", "return torch.relu(x)"),
    "kbit_small.py": ("linear(x, weight, bias)", "linear(x, weight, bias) + 1"),
    "kbit_better.py": ("return min(", "return max("),
}
RUN = """
import json
import torch
from torch import nn
from torch._dynamo.utils import counters
from kbit_inductor.testing import check_kernel, check_pass, rewrite

class Tanh(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 128)

    def forward(self, x):
        return 2 * torch.sigmoid(2 * self.fc(x)) - 1

torch.manual_seed(0)
model, x = Tanh().eval(), torch.randn(3, 64)
found = {}
with torch.no_grad():
    for what, each, given, options in (
        ("pass", model, x, {}),
        ("kernel", nn.Sequential(nn.Linear(64, 48)), x, {}),
        ("quantizer", nn.Sequential(nn.Linear(64, 128)), x, {"quantizer": "better"}),
    ):
        options = {"bits": 2, "activation_bits": 16, **options}
        (graph,) = rewrite(each, given, config=options)
        before = counters["inductor"]["fxgraph_cache_miss"]
        for _ in range(2):  # the second time out of the cache
            torch._dynamo.reset()
            y = torch.compile(each, backend="kbit", options=options)(given)
        misses = counters["inductor"]["fxgraph_cache_miss"] - before
        found[what] = {"operators": graph.operators, "misses": misses, "first": float(y.flatten()[0])}
    import kbit_tanh, kbit_small
    if CHECK:
        found["checked"] = [check_pass(kbit_tanh.tanh, [(model, (x,))]), check_kernel(kbit_small.small, cases=40)]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the packages are installed into, for the tests of this file."""
    folder = tmp_path_factory.mktemp("extensions")
    copies = [folder / "sources" / name for name in PACKAGES]
    for copy, original in zip(copies, PACKAGES.values(), strict=True):  # setuptools builds in place
        copy.mkdir(parents=True)
        for file in original.glob("*.*"):
            (copy / file.name).write_text(file.read_text(encoding="utf-8"), encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install", "--no-deps", "--no-index"]
    command = [*pip, "--no-build-isolation", "--target", str(folder / "target"), *map(str, copies)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "target"


def run(target: Path, check: bool) -> dict:
    """What a process does in which the packages are installed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(target), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", f"CHECK = {check}\n{RUN}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=target.parent)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_packages_take_part_and_an_edit_is_never_served_what_was_made_before_it(target: Path) -> None:
    found = run(target, check=True)
    assert found["pass"]["operators"] == {"kbit.fused_linear_cpu.default": 1}  # the tanh became part of the product
    assert found["kernel"]["operators"] == {"kbit.linear_small.default": 1}
    assert sum(found["quantizer"]["operators"].values()) == 1
    assert found["checked"][0] == 1 and found["checked"][1] > 5
    assert [found[what]["misses"] for what in ("pass", "kernel", "quantizer")] == [1, 1, 1]  # the second time is a hit
    for name, (old, new) in EDITS.items():
        text = (target / name).read_text(encoding="utf-8")
        assert old in text
        (target / name).write_text(text.replace(old, new), encoding="utf-8")
    edited = run(target, check=False)
    assert [edited[what]["misses"] for what in ("pass", "kernel", "quantizer")] == [1, 1, 1]
    assert edited["kernel"]["first"] == pytest.approx(found["kernel"]["first"] + 1)
    assert edited["quantizer"]["first"] != found["quantizer"]["first"]
    assert edited["pass"]["first"] == 0 != found["pass"]["first"]


@pytest.mark.parametrize("name", PACKAGES)
def test_the_page_shows_the_package(name: str) -> None:
    page = (REPOSITORY / "docs" / "extending" / f"{name}.md").read_text(encoding="utf-8")
    files = [file for file in sorted(PACKAGES[name].iterdir()) if file.is_file()]
    assert {file.suffix for file in files} == {".py", ".toml"}
    for file in files:
        text = file.read_text(encoding="utf-8")
        assert f"```{'python' if file.suffix == '.py' else 'toml'}\n{text}```" in page, f"{file.name} differs from the page"
        assert len(text.splitlines()) <= 40

"""Imports go one way: kbit_inductor, then lowering, then kernels."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {"kernels": ("kernels",), "lowering": ("lowering", "kernels")}


def imported(file: Path) -> set[str]:
    """The modules of this package that ``file`` imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] == "kbit_inductor"}


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_nothing_imports_what_stands_above_it(folder: str) -> None:
    found = {file: imported(file) for file in (ROOT / folder).rglob("*.py")}
    assert any(found.values())
    allowed = tuple(f"kbit_inductor.{name}." for name in MAY_IMPORT[folder])
    wrong = [(file.name, name) for file, names in found.items() for name in names if not f"{name}.".startswith(allowed)]
    assert not wrong

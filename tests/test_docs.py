"""Every Python snippet of README.md and docs/ runs as it stands.

A snippet that cannot run here is preceded by ``<!-- not run: the reason -->``. Those of docs/tutorial.md do run, in their order and
in one folder, where ``KBIT_TEST_TUTORIAL`` is set.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import kbit_inductor as kbit

REPOSITORY = Path(__file__).resolve().parent.parent
PAGES = [
    REPOSITORY / "README.md",
    *(page for folder in ("docs", "docs/extending") for page in sorted((REPOSITORY / folder).glob("*.md"))),
]
SNIPPET = re.compile(r"(?:<!-- not run: (?P<reason>[^\n]+?) -->\n+)?^```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)")


@dataclass(frozen=True)
class Snippet:
    page: Path
    line: int
    code: str
    reason: str | None

    @property
    def name(self) -> str:
        return f"{self.page.relative_to(REPOSITORY)}:{self.line}"


def snippets(page: Path) -> list[Snippet]:
    text = page.read_text(encoding="utf-8")
    return [
        Snippet(page, text.count("\n", 0, match.start("code")) + 1, match["code"], match["reason"])
        for match in SNIPPET.finditer(text)
    ]


def anchors(page: Path) -> set[str]:
    """The names of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


ALL = [snippet for page in PAGES for snippet in snippets(page)]


def test_every_snippet_is_found() -> None:
    fences = sum(page.read_text(encoding="utf-8").count("```python") for page in PAGES)
    assert len(ALL) == fences


def test_the_reference_has_all_that_is_public() -> None:
    entries = {line.rpartition(".")[2] for line in (REPOSITORY / "docs/reference.md").read_text(encoding="utf-8").split()}
    assert [name for name in kbit.__all__ if name not in entries and not hasattr(kbit.errors, name)] == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where snippets run: a folder with the repository's ``benchmarks`` in it."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "benchmarks").symlink_to(REPOSITORY / "benchmarks")
    return folder


@pytest.mark.usefixtures("unregister")
@pytest.mark.parametrize("snippet", ALL, ids=lambda snippet: snippet.name)
def test_snippet_runs(snippet: Snippet, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = snippet.page.name == "tutorial.md" and "KBIT_TEST_TUTORIAL" in os.environ
    if snippet.reason is not None and not wanted:
        pytest.skip(snippet.reason)
    monkeypatch.chdir(folder)
    torch.manual_seed(0)
    # Blank lines in front, so that a traceback names the line of the page.
    code = compile("\n" * (snippet.line - 1) + snippet.code, str(snippet.page), "exec")
    exec(code, {"__name__": f"snippet_{snippet.line}"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        file = page.parent / target if target else page
        assert file.is_file(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in anchors(file), f"{page.name} links to {target}#{anchor}"

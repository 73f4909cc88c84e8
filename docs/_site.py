"""Hooks of mkdocs: the README is the home page, and files outside of docs/ that pages link to are part of the site."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

REPOSITORY = Path(__file__).resolve().parent.parent
FOLDERS = "(?:benchmarks/results|examples|kbit_inductor|kernels|lowering|tests)"
OUTSIDE = re.compile(rf"\]\((?:\.\./)*(?P<path>{FOLDERS}/[^)#\s]+)")


def on_files(files: Files, config: Any) -> Files:
    """Add the home page and the linked files, under the paths that they have in the repository."""
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "index.md", content=readme.replace("](docs/", "](")))
    pages = [readme, *(file.content_string for file in list(files) if file.is_documentation_page())]
    linked = {found["path"] for page in pages for found in OUTSIDE.finditer(page)}
    for path in sorted(linked):
        files.append(File.generated(config, f"files/{path}.txt", abs_src_path=str(REPOSITORY / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links to those files, and to the README, lead to where they are in the site."""
    up = "../" * page.file.src_uri.count("/")
    markdown = OUTSIDE.sub(lambda found: f"]({up}files/{found['path']}.txt", markdown)
    return re.sub(r"\]\((?:\.\./)+README\.md", f"]({up}index.md", markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Roles of Sphinx in docstrings (``:func:``) are plain code here."""
    return re.sub(r":(?:attr|class|data|func|meth|mod):(?=<code>)", "", html)

"""A page in headless Chromium: what looks at the page of ``explain`` uses it, the pictures of docs/ and the tests."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")


def chromium() -> str | None:
    """The path of a Chromium that is installed, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@contextlib.contextmanager
def open_page(file: Path) -> Iterator[tuple[Any, list[str]]]:
    """``(page, errors)``: playwright's page that shows ``file``, and what goes wrong on it, as it comes."""
    errors: list[str] = []
    with sync_playwright() as playwright:
        # --no-sandbox: Chromium refuses to run as root with its sandbox, and the page is our own.
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1600, "height": 1000})
        page.on("console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("requestfailed", lambda request: errors.append(f"{request.url} was not loaded"))
        page.goto(file.as_uri())
        yield page, errors
        browser.close()

import io

import pytest
from rich.console import Console

from kbit_inductor import progress


@pytest.mark.parametrize(("patience", "terminal", "shown"), [(0.0, True, True), (0.0, False, False), (60.0, True, False)])
def test_a_bar_is_shown_on_a_terminal_once_packing_takes_long(monkeypatch, patience, terminal, shown):
    output = io.StringIO()
    monkeypatch.setattr(progress, "PATIENCE", patience)
    monkeypatch.setattr(progress, "Console", lambda stderr: Console(file=output, force_terminal=terminal))
    with progress.Progress(2, "packing") as bar:
        bar.advance("model.first")
        bar.advance("model.second")
    assert ("model.second" in output.getvalue()) == shown
    assert bool(output.getvalue()) == shown

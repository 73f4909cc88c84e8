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


@pytest.mark.parametrize("terminal", [True, False])
def test_what_is_waited_for_is_told_on_a_terminal_until_it_comes(monkeypatch, terminal):
    output = io.StringIO()
    monkeypatch.setattr(progress, "Console", lambda stderr: Console(file=output, force_terminal=terminal))
    shown = []
    for element in progress.first_awaited(iter(range(4)), 2, "compiling"):
        shown.append((element, "compiling" in output.getvalue()))
        output.truncate(0)
    assert shown == [(0, terminal), (1, False), (2, False), (3, False)]
    assert not list(progress.first_awaited([], 2, "nothing"))

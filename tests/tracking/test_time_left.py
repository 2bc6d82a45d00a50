"""The time that is left, by a clock of the test's own."""

from __future__ import annotations

from io import StringIO

from rich.console import Console
from rich.progress import Progress

from mirai_ds.runtime.time_left import TimeLeft


def test_it_counts_down_between_reports_and_is_never_unknown() -> None:
    now = [100.0]
    left = TimeLeft(10, lambda: now[0])
    now[0] = 112.0
    assert (left.seconds(), left.text()) == (None, "0:12 so far")
    left.report(10, 110)  # nothing was done yet
    assert left.seconds() is None
    now[0] = 120.0
    left.report(20, 110)  # ten in twenty seconds, ninety to go
    assert (left.seconds(), left.text()) == (180.0, "3:00 left")
    now[0] = 220.0  # a hundred seconds without a report: rich's own would have given up
    assert left.text() == "1:20 left"
    now[0] = 1000.0
    assert left.text() == "0:00 left"
    left.report(30, 40)
    assert left.seconds() == (1000 - 100) / 20 * 10
    left.report(5, 4005)  # gone back behind the start: as before
    assert left.seconds() == 450.0
    now[0] = 100.0 + 3600 * 10
    left.report(11, 12)
    assert left.text() == "10:00:00 left"


def test_a_bar_shows_it() -> None:
    out = StringIO()
    now = [0.0]
    left = TimeLeft(0, lambda: now[0])
    console = Console(file=out, force_terminal=True, width=80, _environ={})
    with Progress("{task.description}", left, console=console, auto_refresh=False) as bar:
        task = bar.add_task("steps", total=10)
        bar.refresh()
        now[0] = 4.0
        bar.update(task, completed=2, refresh=True)  # as good as a report
        now[0] = 8.0
        bar.refresh()
    text = out.getvalue()
    assert "0:00 so far" in text
    assert "0:16 left" in text
    assert "0:12 left" in text
    assert "-:--:--" not in text

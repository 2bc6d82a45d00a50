"""Rows of the start-up benchmark from stamps; no run is started here."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from mirai_ds.benchmarks import startup
from tests.benchmarks.pages import ROOT, committed_rows

# What a process of a start writes, and when: the second of the two ranks is later everywhere.
STARTED = """
import json, os, sys
from mirai_ds.benchmarks import startup
now = [0.0]
startup.time.time = lambda: now[0]
for rank in ("1", "0"):
    os.environ["RANK"] = rank
    for number, phase in enumerate(startup.PHASES):
        now[0] = sum(float(n + 1) for n in range(number + 1)) + 1000.0 * int(rank)
        startup.stamp(phase)
"""


def test_phases_are_the_times_between_stamps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the first rank, from the moment at which the command was given: 1 s, 2 s, 3 s and so on."""
    run = subprocess.run
    monkeypatch.setattr(startup, "time", SimpleNamespace(time=lambda: 0.0))
    monkeypatch.setattr(startup.subprocess, "run", lambda command, **given: run([command[0], "-c", STARTED], **given))
    assert list(startup.one_start([], 2).values()) == [float(n + 1) for n in range(len(startup.PHASES))]


def test_medians_of_the_starts_after_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starts of 5 s, 9 s and 4 s; the medians of the parts do not add up to their median."""
    seconds = iter([(100.0, 100.0), (1.0, 4.0), (8.0, 1.0), (3.0, 1.0)])
    nothing = dict.fromkeys(startup.PHASES, 0.0)
    monkeypatch.setattr(
        startup, "one_start", lambda *_: {**nothing, **dict(zip(("command", "rank"), next(seconds), strict=True))}
    )
    monkeypatch.setattr(startup, "help_seconds", iter([9.0, 0.3, 0.1, 0.2]).__next__)
    rows = startup.measure(repeat=3, cases=list(startup.CASES)[:1])
    found = {row["variant"]: (row["value"], row["ratio"]) for row in rows}
    assert found["all"] == ("5", "1.000")
    assert found[startup.PHASES["command"]] == ("3", "0.600")
    assert found[startup.PHASES["rank"]] == ("1", "0.200")
    assert found["mirai-ds --help"] == ("0.2", "")


def test_stamps_are_the_first_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(startup.STAMPS, str(tmp_path / "stamps"))
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        startup.stamp("session")
    assert (tmp_path / "stamps").read_text().count("session") == 1


def test_committed_rows() -> None:
    rows = committed_rows("startup")
    assert {r["model"] for r in rows} <= {*startup.CASES, ""}
    assert {r["variant"] for r in rows} == {"all", "mirai-ds --help", *startup.PHASES.values()}
    page = (ROOT / "docs" / "startup.md").read_text(encoding="utf-8")
    assert startup.table(rows) in page, "the page lacks `mirai-ds bench startup --table --out docs/results/startup.csv`"


@pytest.mark.matrix
def test_every_part_of_a_start_is_seen() -> None:
    """It raises where a part was not stamped, as when a function was renamed that it looks for."""
    assert list(startup.one_start([], 1)) == list(startup.PHASES)

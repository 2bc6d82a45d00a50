"""Rows of the start-up benchmark from stamps; nothing is started here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from mirai_ds.benchmarks import startup
from tests.benchmarks.pages import ROOT, committed_rows


def test_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Medians of the starts after the first, shares of their sum."""
    starts: dict[Sequence[str], int] = {}

    def one(overrides: Sequence[str], ranks: int) -> dict[str, float]:
        starts[overrides] = starts.get(overrides, 0) + 1
        return dict.fromkeys(startup.PHASES, 100.0 if starts[overrides] == 1 else float(starts[overrides] - 1))

    monkeypatch.setattr(startup, "one_start", one)
    monkeypatch.setattr(startup, "help_seconds", lambda: 0.3)
    rows = startup.measure(ranks=2, repeat=3, told="bench startup")
    assert [r["variant"] for r in rows[:9]] == ["all", *startup.PHASES.values()]
    assert {(r["value"], r["ratio"]) for r in rows[1:9]} == {("2", "0.125")}
    assert (rows[0]["value"], rows[0]["ratio"], rows[-1]["value"], rows[-1]["ratio"]) == ("16", "1.000", "0.3", "")
    assert all(set(r) == set(startup.FIELDS) for r in rows)
    assert len(startup.table(rows).splitlines()) == 2 + len(rows) == 2 + 2 * 9 + 1


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

"""A start is measured from the command to its first step, in parts that are all there."""

from __future__ import annotations

from pathlib import Path

import pytest

from mirai_ds.benchmarks import startup
from mirai_ds.benchmarks.harness import read

ROOT = Path(__file__).resolve().parents[2]


def test_the_document_shows_the_committed_rows() -> None:
    rows = read(ROOT / "docs" / "results" / "startup.csv")
    assert startup.table(rows) in (ROOT / "docs" / "startup.md").read_text(encoding="utf-8")
    assert {row["variant"] for row in rows} >= {*startup.PHASES.values(), "all", "mirai-ds --help"}


@pytest.mark.matrix
def test_every_part_of_a_start_is_seen() -> None:
    """It raises where a part was not stamped, as when a function was renamed that it looks for."""
    assert list(startup.one_start([], 1)) == list(startup.PHASES)

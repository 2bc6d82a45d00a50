"""Tables of the documentation that are made from committed rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mirai_ds.benchmarks.harness import read

ROOT = Path(__file__).resolve().parents[2]
Rows = list[dict[str, str]]


def committed_rows(name: str) -> Rows:
    """Rows of `docs/results/NAME.csv`, each of which says when, where and by what command it was measured."""
    rows = read(ROOT / "docs" / "results" / f"{name}.csv")
    assert rows
    for row in rows:
        assert row["command"].startswith(("python -m mirai_ds.", "mirai-ds bench ")), row
        assert all(row[column] for column in ("date", "device", "torch")), row
    return rows


def check_page(page: str, name: str, table: Callable[[Rows], str]) -> Rows:
    """`docs/PAGE` shows what the command in its comment prints; returns the rows."""
    rows = committed_rows(name)
    begin = f"<!-- mirai-ds bench {name} --table --out docs/results/{name}.csv -->\n"
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    assert text.split(begin)[1].split("\n<!-- end -->")[0] == table(rows)
    return rows

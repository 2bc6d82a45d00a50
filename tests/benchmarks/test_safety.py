"""The document shows the committed rows, and the benchmark measures what it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from mirai_ds.benchmarks import safety
from mirai_ds.benchmarks.harness import read
from tests.benchmarks.pages import check_page


def test_the_document_shows_the_committed_rows() -> None:
    check_page("resilience.md", "safety", safety.table)


@pytest.mark.matrix
def test_ratios_are_of_the_values_beside_them(tmp_path: Path) -> None:
    out = tmp_path / "rows.csv"
    small = [
        "model.dim=32",
        "model.n_layer=3",
        "model.n_head=2",
        "foresight.projector_dim=32",
        "train.global_batch_size=16",
    ]
    settings = [part for o in small for part in ("--set", o)]
    assert safety.main(["--rounds", "2", "--ranks", "2", "--out", str(out), *settings]) == 0
    rows = read(out)
    assert [(r["what"].split(" ")[0], r["variant"]) for r in rows[:2]] == [("step", "guarded"), ("step", "bare")]
    written = next(r for r in rows if r["variant"] == "copy, write, flush")
    for row in rows[1:]:  # the guarded step's is a median of ratios, not a ratio of medians
        base = float((written if row["what"] == written["what"] else rows[1])["value"])
        assert float(row["ratio"]) == pytest.approx(float(row["value"]) / base, rel=2e-3, abs=6e-4), row
    assert {r["ranks"] for r in rows} == {"2"}

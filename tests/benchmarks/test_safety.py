"""The document shows the committed rows, and the benchmark measures what it says."""

from __future__ import annotations

from pathlib import Path

from mirai_ds.benchmarks import safety
from mirai_ds.benchmarks.harness import read
from tests.benchmarks.pages import check_page


def test_the_document_shows_the_committed_rows() -> None:
    check_page("resilience.md", "safety", safety.table)


def test_it_runs_and_both_variants_train(tmp_path: Path) -> None:
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
    assert all(float(r["value"]) > 0 for r in rows if r["what"] != "part of a guarded step")
    assert {r["ranks"] for r in rows} == {"2"}

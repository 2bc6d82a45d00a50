"""The document shows the committed rows, and the benchmark measures what it says."""

from __future__ import annotations

from pathlib import Path

from mirai_ds.benchmarks import safety
from mirai_ds.benchmarks.harness import read

ROOT = Path(__file__).resolve().parents[2]


def test_the_document_shows_the_committed_rows() -> None:
    text = (ROOT / "docs" / "resilience.md").read_text(encoding="utf-8")
    shown = text.split("<!-- python -m mirai_ds.benchmarks.safety --table -->\n")[1].split("\n<!-- end -->")[0]
    rows = read(ROOT / "docs" / "results" / "safety.csv")
    assert shown == safety.table(rows)
    for row in rows:
        assert row["command"].startswith("python -m mirai_ds.benchmarks.safety")
        assert row["date"]
        assert row["device"]


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

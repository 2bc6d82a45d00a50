"""The benchmark runs, both sides of each comparison do the same work, and the documents show the committed rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mirai_ds.benchmarks import data as bench
from mirai_ds.benchmarks.harness import read
from mirai_ds.tokenizer import VQ16, VQTokenizer
from tests.benchmarks.pages import check_page


def test_the_document_shows_the_measured_rows() -> None:
    rows = check_page("data.md", "data", bench.table)
    assert {row["task"] for row in rows} == {"loader", "views", "extract"}
    assert all(row["value"] and row["ratio"] for row in rows)


@pytest.mark.exhaustive
def test_it_runs_and_adds_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.csv"
    for _ in range(2):  # the second run replaces the first one's rows
        assert bench.main(["--device", "cpu", "--quick", "--out", str(out)]) == 0
    found = read(out)
    assert [row["variant"] for row in found] == [
        "token store", ".npy files", "png store", "webp store", "jpeg store", "original files", "batched",
        "an image at a time",
    ]  # fmt: skip
    assert [row["ratio"] for row in found if row["variant"] in (".npy files", "original files")] == ["1.00", "1.00"]
    capsys.readouterr()
    assert bench.main(["--table", "--out", str(out)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(found)


@pytest.mark.matrix
def test_both_ways_of_extracting_give_the_same_codes(tmp_path: Path) -> None:
    from dataclasses import replace

    tokenizer = VQTokenizer.random(replace(VQ16, channels=32))
    runs = bench.extraction(tmp_path, tokenizer, 1, 10, 1)
    assert [run() for run in runs.values()] == [1, 1]
    batched = np.load(tmp_path / "part.npz")["codes"]
    assert np.array_equal(batched, np.load(tmp_path / "codes.npy"))
    assert batched.shape == (1, 10, 256)


def test_speeds_are_medians_of_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(np.cumsum([9, 9, 0, 1, 0, 4, 0, 2, 0, 4, 0, 4, 0, 4]).tolist())  # two to warm up, then pairs
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(clock))
    speeds = bench.in_turns({"a": lambda: 8, "b": lambda: 8}, 3)
    assert speeds == {"a": 4.0, "b": 2.0}
    found = bench.rows("task", "u/s", speeds, {"a": "note"}, {"device": "d", "date": "now"})
    assert [(row["ratio"], row["note"]) for row in found] == [("2.00", "note"), ("1.00", "")]

"""Rows of a results folder come into the table and the pages; a fake GPU's and damaged ones do not."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.check import pages
from tests.gpu.check.facts import ROOT
from tests.gpu.check.import_results import CSV, RefusedError, main, merged, read_folder, read_table
from tests.gpu.check.native_rows import COLUMNS, READERS, one

ROW: dict[str, Any] = dict.fromkeys(COLUMNS, "") | {
    "date": "2026-11-27", "card": "NVIDIA H200", "torch": "2.11.0", "commit": "87ac7a2", "command": "python -m thing",
    "slice": "5 step times", "subject": "sampling", "model": "GPT-B", "batch": "32", "variant": "ours",
    "metric": "batch", "value": "188", "unit": "ms", "fake": False,
}  # fmt: skip


def folder(path: Path, *rows: dict[str, Any] | str) -> Path:
    path.mkdir()
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (path / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(("change", "part"), [
    ({"fake": True}, "a fake device measures nothing"), ({"card": "NVIDIA H100 (fake)"}, "a fake device"),
    ({"value": "fast"}, "value"), ({"date": "yesterday"}, "date"), ({"commit": "main"}, "commit"),
    ({"metric": ""}, "metric"), ({"colour": "red"}, "colour"), ({"batch": "many"}, "batch"),
])  # fmt: skip
def test_a_row_that_is_none_is_refused_by_its_line(tmp_path: Path, change: dict[str, Any], part: str) -> None:
    where = folder(tmp_path / "results", ROW, ROW | change)
    with pytest.raises(RefusedError) as caught:
        read_folder(where)
    assert "rows.jsonl:2: " in str(caught.value)
    assert part in str(caught.value)


def test_one_wrong_row_imports_nothing(tmp_path: Path) -> None:
    table = tmp_path / "gpu.csv"
    shutil.copy(CSV, table)
    before = table.read_bytes()
    where = folder(tmp_path / "results", ROW, "{not JSON")
    assert main([str(where), "--csv", str(table), "--root", str(tmp_path)]) == 2
    assert table.read_bytes() == before


def test_a_measurement_that_is_made_again_replaces_the_earlier(tmp_path: Path) -> None:
    first = read_folder(folder(tmp_path / "first", ROW, ROW | {"variant": "theirs", "value": "233"}))
    second = read_folder(folder(tmp_path / "second", ROW | {"value": "150", "date": "2026-12-01"}))
    other = read_folder(folder(tmp_path / "third", ROW | {"commit": "0123abc", "value": "99"}))
    rows = merged(first, second + other)
    assert [(row.variant, row.commit, row.value) for row in rows] == [
        ("ours", "87ac7a2", "150"), ("theirs", "87ac7a2", "233"), ("ours", "0123abc", "99"),
    ]  # fmt: skip


def test_rows_come_into_the_pages(tmp_path: Path) -> None:
    """The whole way: a folder, the table, a page whose other words stay."""
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "sampling.md"
    page.write_text("Before.\n<!-- gpu:sampling -->\nold\n<!-- /gpu -->\nAfter.\n", encoding="utf-8")
    where = folder(tmp_path / "results", ROW, ROW | {"batch": "256", "value": "522"})
    assert main([str(where), "--csv", str(tmp_path / "gpu.csv"), "--root", str(tmp_path)]) == 0
    text = page.read_text(encoding="utf-8")
    assert "old" not in text
    assert text.startswith("Before.\n<!-- gpu:sampling -->\n")
    assert text.endswith("<!-- /gpu -->\nAfter.\n")
    assert "| ours | 188 | 522 |" in text
    assert "NVIDIA H200" in text
    assert main(["--csv", str(tmp_path / "gpu.csv"), "--root", str(tmp_path)]) == 0
    assert page.read_text(encoding="utf-8") == text


def test_the_committed_pages_are_what_the_table_says() -> None:
    """Nobody edits a number by hand."""
    rows = [row.model_dump() for row in read_table()]
    assert len(rows) > 100
    found = pages.marked(ROOT)
    assert {path.name for path in found} >= {"performance.md", "kernels.md", "sampling.md", "data.md", "numerics.md"}
    for path in found:
        text = path.read_text(encoding="utf-8")
        assert pages.written(text, rows) == text, f"{path.name}: python -m tests.gpu.check.import_results"


def test_benchmarks_rows_are_read(tmp_path: Path) -> None:
    """The readers follow the columns that the benchmarks write."""
    from mirai_ds.benchmarks import data as extraction
    from mirai_ds.benchmarks import kernels, safety, sampling, step
    from mirai_ds.benchmarks import memory as measured

    columns = {"step": step.FIELDS, "sampling": sampling.FIELDS, "extract": extraction.FIELDS, "safety": safety.FIELDS,
               "memory": measured.FIELDS, "kernels": [f.name for f in fields(kernels.Row)]}  # fmt: skip
    for name, names in columns.items():
        path = tmp_path / f"{name}.csv"
        path.write_text(",".join(names) + "\n" + ",".join("1" for _ in names) + "\n", encoding="utf-8")
        found = list(READERS[name](path, ""))
        assert found, name
        assert all(float(row["value"]) > 0 for row in found), name


def test_other_rows_are_read(tmp_path: Path) -> None:
    junit = tmp_path / "rows"
    junit.write_text(
        '<testsuites><testsuite tests="5" failures="1" errors="0" skipped="1">'
        '<testcase classname="tests.gpu.test_gpu" name="a"/></testsuite></testsuites>', encoding="utf-8",
    )  # fmt: skip
    found = {row["metric"]: row["value"] for row in READERS["junit"](junit, "")}
    assert found == {"passed": 3, "failed": 1, "skipped": 1}
    log = "words\n{not a row\n" + json.dumps(one("plan", "planned step", "3", "ms", model="GPT-B")) + "\n"
    (row,) = READERS["lines"](tmp_path / "none", log)
    assert (row["subject"], row["model"], row["value"]) == ("plan", "GPT-B", "3")
    told = "110 kernels for sm_80: 0 use local memory\n========= ERROR SUMMARY: 0 errors\n"
    assert [(row["metric"], row["value"]) for row in READERS["verdict"](tmp_path / "none", told)] == [
        ("kernels", "110"), ("spilled", "0"), ("errors", "0"),
    ]  # fmt: skip

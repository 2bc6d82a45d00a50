"""docs/layouts.md is what `mirai-ds plan` says."""

from __future__ import annotations

from pathlib import Path

from mirai_ds.config.deepspeed_file import packaged_names
from mirai_ds.planning import layouts

PAGE = (Path(__file__).resolve().parents[2] / layouts.PAGE).read_text(encoding="utf-8")


def test_the_tables_are_those_of_plan() -> None:
    assert layouts.written(PAGE) == PAGE, "run python -m mirai_ds.planning.layouts --write"
    assert layouts.written(PAGE.replace("| `a100x8` | `mirai-e-b` | 32", "| `a100x8` | `mirai-e-b` | 31")) == PAGE


def test_every_file_is_explained() -> None:
    assert [name for name in packaged_names() if f"`{name}`" not in PAGE] == []
    assert {m.file for m in layouts.MACHINES} | {file for file, _ in layouts.FILES} <= set(packaged_names())

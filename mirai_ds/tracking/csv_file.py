"""`RUN/metrics.csv`: what metrics.jsonl holds, a row a value."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable
from typing import Any

from mirai_ds.runtime.disk import write_whole
from mirai_ds.tracking.tracker import TrackedRun, Tracker

COLUMNS = ("step", "tag", "value")


class CsvFile(Tracker):
    """Rows of step, tag and value; a value has the digits of metrics.jsonl.

    A start writes it anew from what metrics.jsonl holds up to its step: no row comes twice after a resume that steps
    back, and a file that a full disk has torn is whole again.
    """

    machine_values = False

    def __init__(self, run: TrackedRun) -> None:
        path, records = run.folder / "metrics.csv", run.folder / "metrics.jsonl"
        known = records.read_bytes()[: run.recorded].decode() if run.recorded else ""
        rows = [COLUMNS, *(row for line in known.splitlines() for row in _rows(json.loads(line)))]
        write_whole(path, _text(rows))
        self._file = path.open("a", encoding="utf-8", newline="")

    def scalars(self, values: dict[str, float], step: int) -> None:
        """See `Tracker.scalars`."""
        self._file.write(_text(_rows({"step": step, **values})))
        self._file.flush()

    def close(self) -> None:
        """See `Tracker.close`."""
        self._file.close()


def _rows(record: dict[str, Any]) -> list[tuple[Any, ...]]:
    return [(record["step"], tag, value) for tag, value in record.items() if tag not in ("step", "epoch")]


def _text(rows: Iterable[tuple[Any, ...]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()

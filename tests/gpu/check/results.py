"""The folder that comes back: summary.json, summary.txt, rows.jsonl and logs.tar, each whole after every step.

A machine may be taken away at any moment, and few files come back from it: what is done is in these four at once.
"""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path
from threading import Lock
from typing import Any

from tests.gpu.check.native_rows import COLUMNS, Row

LOG_BYTES = 400_000  # kept of a log, half from its beginning and half from its end
PASSED, FAILED, KILLED, SKIPPED, NOT_RUN = "passed", "failed", "killed", "skipped", "not run"


class Results:
    """Verdicts, rows and logs in `folder`; safe to use from several threads."""

    def __init__(self, folder: Path, about: Row) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.about, self._lock = folder, about, Lock()
        self.running = folder / "running"
        shutil.rmtree(self.running, ignore_errors=True)
        self.running.mkdir()
        try:
            stored = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            stored = {}
        self.steps: dict[str, dict[str, Any]] = stored.get("steps", {})

    def passed(self, key: str) -> bool:
        """Whether the step has passed here, on this card, at this commit."""
        found = self.steps.get(key, {})
        same = all(found.get(name) == self.about.get(name) for name in ("card", "commit"))
        return same and found.get("verdict") == PASSED

    def add(self, key: str, found: dict[str, Any], rows: list[Row], log: Path | None) -> None:
        """Put a step's verdict, rows and log where they stay, in place of those of an earlier try."""
        with self._lock:
            origin = {name: self.about.get(name) for name in ("card", "commit", "date")}
            self.steps[key] = {**found, "rows": len(rows), **origin}
            told = [row | {"fake": bool(self.about.get("fake"))} for row in rows]
            same = ("slice", "command")
            mine = {tuple(row[name] for name in same) for row in told}
            kept = [row for row in self.rows() if tuple(row[name] for name in same) not in mine]
            write(self.folder / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in kept + told))
            if log is not None and log.is_file():
                shorten(log)
                with tarfile.open(self.folder / "logs.tar", "a") as archive:
                    archive.add(log, log.name)
                log.unlink()
            self._summarise()

    def rows(self) -> list[Row]:
        """All rows so far."""
        path = self.folder / "rows.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        return [json.loads(line) for line in lines if line.strip()]

    def row(self, command: str, piece: str, found: Row) -> Row:
        """With the columns that say where."""
        about = {name: self.about.get(name, "") for name in COLUMNS if name in self.about}
        whole = about | {"command": command, "slice": piece} | found
        return {name: str(whole.get(name, "")) for name in COLUMNS}

    def table(self) -> str:
        """A line a step: verdict, seconds, rows, and why where it did not pass."""
        width = max([len(key) for key in self.steps] + [4])
        head = f"{'step':{width}}  {'verdict':8}  {'seconds':>7}  {'rows':>5}"
        lines = [
            f"{key:{width}}  {s['verdict']:8}  {s['seconds']:7.1f}  {s['rows']:5}  {s['why']}".rstrip()
            for key, s in self.steps.items()
        ]
        return "\n".join([head, *lines])

    def _summarise(self) -> None:
        about = ", ".join(f"{name} {value}" for name, value in self.about.items() if value not in ("", False))
        write(self.folder / "summary.json", json.dumps({**self.about, "steps": self.steps}, indent=1) + "\n")
        write(self.folder / "summary.txt", f"{about}\n\n{self.table()}\n")


def write(path: Path, text: str) -> None:
    """Whole or not at all."""
    beside = path.with_suffix(".new")
    beside.write_text(text, encoding="utf-8")
    beside.rename(path)


def shorten(log: Path) -> None:
    """Leave out the middle of a long log."""
    size, half = log.stat().st_size, LOG_BYTES // 2
    if size <= LOG_BYTES:
        return
    with log.open("rb") as file:
        head = file.read(half)
        file.seek(size - half)
        tail = file.read()
    log.write_bytes(head + f"\n... {size - 2 * half} bytes left out ...\n".encode() + tail)

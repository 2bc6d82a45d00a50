"""`metrics.jsonl`, the record of a run's values; a resume takes back what came after the resumed step."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from mirai_ds.runtime.disk import write_whole


class JsonLines:
    """One JSON object a line, flushed as written."""

    def __init__(self, path: Path, resume_step: int, resume_bytes: int = -1) -> None:
        """resume_bytes: the file's length when the checkpoint of `resume_step` was taken; -1: not known."""
        self.path = path
        if path.exists():
            self._take_back(resume_step, resume_bytes)
        self._file = path.open("a", encoding="utf-8")

    def _take_back(self, step: int, length: int) -> None:
        """Drop what was written after the checkpoint, so that a resumed run continues one clean sequence.  Where the
        length is not known or the file is shorter (a machine lost power), by the steps in it."""
        text = self.path.read_bytes()
        if step == 0:
            kept = b""  # the run begins anew
        elif 0 < length <= len(text) and text[length - 1 : length] == b"\n":
            kept = text[:length]
        else:
            kept = b"".join(line for line in text.splitlines(keepends=True) if _step_of(line) <= step)
        write_whole(self.path, kept)

    def position(self) -> int:
        """Length of the file in bytes, everything written by now included."""
        return self._file.tell()

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; it must hold `step`."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _step_of(line: bytes) -> float:
    """The step of a line; infinity for a torn one."""
    try:
        return float(json.loads(line)["step"]) if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf

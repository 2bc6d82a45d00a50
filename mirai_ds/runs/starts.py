"""Who ran and who runs: a run's starts, its present holder, how the last start ended.  Every key may be missing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from mirai_ds.runs.lock import Attempt
from mirai_ds.runs.records import code_text, count_text, read_lines, time_text


@dataclass(frozen=True)
class StartRecord:
    """A line of starts.jsonl.  `resume` is the request it was given; None for a start from the beginning."""

    unix_time: float | None
    ranks: int | None
    code: str
    torch: str
    resume: str | None

    @property
    def text(self) -> str:
        """For one line."""
        began = "began anew" if self.resume is None else f"--resume {self.resume}"
        ranks = "unknown ranks" if self.ranks is None else count_text(self.ranks, "rank")
        return f"{time_text(self.unix_time)}, {began}, {ranks}, code {code_text(self.code)}, torch {self.torch}"


def read_starts(run: Path) -> list[StartRecord]:
    """All starts, oldest first."""
    starts = []
    for line in read_lines(run / "starts.jsonl"):
        packages = line.get("packages")
        torch = packages.get("torch") if isinstance(packages, dict) else None
        resume = _resume_request(line.get("command"))
        when, ranks = _number(line.get("unix_time")), _number(line.get("world_size"))
        starts.append(
            StartRecord(
                when, None if ranks is None else int(ranks), str(line.get("code") or "unknown"), str(torch), resume
            )
        )
    return starts


def _resume_request(command: Any) -> str | None:
    words = [str(word) for word in command] if isinstance(command, list) else []
    for word, after in pairwise([*words, ""]):
        if word == "--resume":
            return after
        if word.startswith("--resume="):
            return word.partition("=")[2]
    return None


def _number(value: Any) -> float | None:
    usable = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return value if usable else None


def holder_text(one: Attempt) -> str:
    """Who holds, or held, the run."""
    return f"{one.who}; {f'ended: {one.ended}' if one.ended else 'has not said that it ended'}"

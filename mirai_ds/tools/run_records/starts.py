"""Who ran and who runs: a run's starts, its present holder, how the last start ended.  Every key may be missing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from mirai_ds.tools.run_records.records import Json, code_text, count_text, read_json, read_lines, time_text

VERDICTS = ("finished", "requeue", "stopped", "failed")


@dataclass(frozen=True)
class Start:
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


def read_starts(run: Path) -> list[Start]:
    """All starts, oldest first."""
    found = []
    for line in read_lines(run / "starts.jsonl"):
        packages = line.get("packages")
        torch = packages.get("torch") if isinstance(packages, dict) else None
        resume = _resume_request(line.get("command"))
        when, ranks = _number(line.get("unix_time")), _number(line.get("world_size"))
        found.append(
            Start(when, None if ranks is None else int(ranks), str(line.get("code") or "unknown"), str(torch), resume)
        )
    return found


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


def read_incarnations(run: Path) -> list[Json]:
    """What every start wrote of itself when it took the run (`incarnations/00003.json`, or one incarnation.json),
    oldest first."""
    folder = run / "incarnations"
    paths = sorted(p for p in folder.glob("*.json") if p.stem.isdigit()) if folder.is_dir() else []
    found = [read_json(path) or {"number": int(path.stem), "ended": "died at once"} for path in paths]
    return found or [one for one in (read_json(run / "incarnation.json"),) if one is not None]


def holder_text(one: Json) -> str:
    """Who holds, or held, the run."""
    job = f"job {one['job']}" if one.get("job") else ""
    where = [f"host {one['host']}" if one.get("host") else "", f"pid {one['pid']}" if one.get("pid") else ""]
    since = f"since {time_text(one['started'])}" if one.get("started") else ""
    told = ", ".join(part for part in (job, *where, since) if part)
    ended = f"ended: {one['ended']}" if one.get("ended") else "has not said that it ended"
    return f"start {one.get('number', '?')} ({told or 'says nothing of itself'}); {ended}"


def living_until(incarnations: list[Json]) -> dict[int, float]:
    """Start -> last step it wrote that the run still builds upon; empty where that is not known."""
    begun = {one.get("number"): one for one in incarnations if _number(one.get("resumed_after")) is not None}
    numbers = [number for number in begun if isinstance(number, int)]
    living: dict[int, float] = {}
    number, limit = (max(numbers) if numbers else None), math.inf
    while isinstance(number, int) and number not in living:
        living[number] = limit
        one = begun.get(number, {})
        number, limit = one.get("resumed_from"), min(limit, float(one.get("resumed_after") or 0))
    return living


def read_outcome(run: Path) -> tuple[str, str] | None:
    """Verdict and reason of the start that ended last; None where nothing was written."""
    try:
        word, _, reason = (run / "outcome").read_text(encoding="utf-8").strip().partition(" ")
    except (OSError, ValueError):
        return None
    return (word, reason) if word in VERDICTS else None

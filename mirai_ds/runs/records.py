"""A run's own records, read as they are found: torn lines, missing files and files of other versions are no errors."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mirai_ds.config import UserError
from mirai_ds.config.old_names import current_names
from mirai_ds.config.run_config import HOOK_NAMES
from mirai_ds.config.yaml_text import parse

METRICS = "metrics.jsonl"
CLOCK = ("speed/", "memory/")  # depend on the clock or the machine: no part of a curve

Json = dict[str, Any]


@dataclass
class Curve:
    """metrics.jsonl.  values[metric][step]; the last line of a step counts.  null is NaN."""

    values: dict[str, dict[int, float]] = field(default_factory=dict)
    epochs: dict[int, float] = field(default_factory=dict)
    unreadable: list[int] = field(default_factory=list)  # line numbers, from 1
    lines: int = 0

    @property
    def steps(self) -> list[int]:
        """All steps that have a line, in order."""
        return sorted(self.epochs)


def parse_curve(data: bytes) -> Curve:
    """The curve in the bytes of a metrics.jsonl.  A line that is no record (torn by a kill) is counted and left out."""
    curve = Curve()
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        curve.lines += 1
        try:
            record = json.loads(line)
            step = record["step"]
            if isinstance(step, bool) or not isinstance(step, int):
                raise ValueError("a step is a whole number")
            numbers = {name: _number(value) for name, value in record.items() if name != "step"}
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            curve.unreadable.append(number)
            continue
        curve.epochs[step] = numbers.pop("epoch", None) or 0.0
        for name, value in numbers.items():
            if value is not None:
                curve.values.setdefault(name, {})[step] = value
    return curve


def _number(value: object) -> float | None:
    """None for what is no number; null is NaN."""
    if value is None:
        return math.nan
    return float(value) if isinstance(value, (int, float)) else None


@dataclass(frozen=True)
class RunRecords:
    """What there is of a run: the curve always, the rest where it was found beside it."""

    path: Path
    curve: Curve
    config: Json | None
    environment: Json | None
    starts: list[Json]


def read_run(path: Path) -> RunRecords:
    """From a run folder or the path of a metrics.jsonl.  Raises UserError when there is no curve."""
    file = path / METRICS if path.is_dir() else path
    if not path.exists():
        raise UserError(f"{path}: no such run folder or {METRICS}")
    if not file.is_file():
        raise UserError(f"{path}: is not a run folder with a curve (it has no {METRICS}); give one, or the file itself")
    try:
        curve = parse_curve(file.read_bytes())
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error})") from None
    if not curve.values:
        torn = f" ({len(curve.unreadable)} of {curve.lines} lines are no records)" if curve.unreadable else ""
        raise UserError(f"{file}: holds no metrics{torn}; was the run stopped before its first record?")
    # A file of another name may lie anywhere: what is beside it need not belong to it.
    folder = file.parent if file.name == METRICS else None
    if folder is None:
        return RunRecords(path, curve, None, None, [])
    return RunRecords(
        path, curve, read_config(folder)[0], read_json(folder / "environment.json"), read_lines(folder / "starts.jsonl")
    )


def read_config(run: Path) -> tuple[Json | None, str]:
    """The mapping in a run's config.yaml, not validated, under today's names; or None and why."""
    path = run / "config.yaml"
    if not path.is_file():
        return None, "there is no config.yaml"
    try:
        data = current_names(parse(path.read_text(encoding="utf-8"), str(path)), str(path))
    except (OSError, UnicodeDecodeError, UserError) as error:
        return None, " ".join(str(error).split())
    if not isinstance(data, dict):
        return None, f"{path}: is not a configuration"
    # Runs of before could not choose.
    data = {**data, "hooks": data.get("hooks", list(HOOK_NAMES))}
    if isinstance(data.get("train"), dict):
        data["train"] = {"cuda_graph": "off", **data["train"]}
    return data, ""


def read_json(path: Path) -> Json | None:
    """A JSON object; None where there is none or it cannot be read."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) else None


def read_lines(path: Path) -> list[Json]:
    """The JSON objects of a .jsonl file; torn lines are left out."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError:
        return []
    rows = []
    for line in lines:
        try:
            data = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(data, dict):
            rows.append(data)
    return rows


def flatten(data: Json, above: str = "") -> Json:
    """Dotted names -> values; lists are values, an empty section is one too."""
    out: Json = {}
    for key, value in data.items():
        name = f"{above}{key}"
        if isinstance(value, dict) and value:
            out |= flatten(value, f"{name}.")
        else:
            out[name] = value
    return out


def plain(value: Any) -> Any:
    """JSON-ready for readers that know no NaN: numbers that are not finite become 'nan', 'inf' or '-inf'."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def size_text(size: int) -> str:
    """Bytes for people: 6558375904 -> '6.6 GB'."""
    value = float(size)
    for unit in ("bytes", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"


def time_text(unix_time: object) -> str:
    """Local time for people; 'unknown time' for what is none."""
    if isinstance(unix_time, bool) or not isinstance(unix_time, (int, float)):
        return "unknown time"
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(unix_time))
    except (OverflowError, ValueError, OSError):
        return "unknown time"


def code_text(code: object) -> str:
    """A commit short enough for one line: '026f8edc5b...+changes' -> '026f8edc5b+changes'."""
    commit, plus, changes = str(code or "unknown").partition("+")
    return f"{commit[:10]}{plus}{changes}" if len(commit) == 40 else str(code or "unknown")


def count_text(count: int, what: str) -> str:
    """'1 step', '2 steps'."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"

"""What a run folder holds: settings, starts, numbers, checkpoints, and what a resume would do.  Changes nothing."""

from __future__ import annotations

import math
import shutil
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mirai_ds.analysis.checkpoints import (
    Checkpoint,
    Resume,
    folder_size,
    leftovers,
    read_checkpoints,
    read_pointer,
    resume_point,
)
from mirai_ds.config import RunConfig, UserError, build
from mirai_ds.runs.lock import Attempt, read_all, valid_attempts
from mirai_ds.runs.outcome import NAME as OUTCOME
from mirai_ds.runs.outcome import read as read_outcome
from mirai_ds.runs.records import METRICS, Curve, Json, count_text, parse_curve, read_config
from mirai_ds.runs.starts import StartRecord, read_starts

RUN_FILES = ("config.yaml", METRICS, "starts.jsonl", "checkpoints")
_EXPORTS = (".pt", ".pth", ".safetensors")


@dataclass
class RunReport:
    """Everything there is to say about a run folder.  config: None when it is missing or of another version; `raw`
    is then what can be read of it."""

    path: Path
    config: RunConfig | None
    raw: Json
    starts: list[StartRecord]
    attempts: list[Attempt]
    outcome: tuple[str, str] | None
    curve: Curve
    checkpoints: list[Checkpoint]
    digests_read: bool
    latest: str | None
    leftovers: list[str]
    resume: Resume
    samples: list[str]
    exports: list[str]
    nonfinite: list[str]
    hang: list[str]
    earlier_configs: list[str]
    used: int
    free: int
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The run's name in its configuration, else the folder's."""
        return str(self.raw.get("name") or self.path.resolve().name)

    @property
    def damages(self) -> list[str]:
        """One line for each checkpoint that is not whole."""
        return [one.damage for one in self.checkpoints if one.damage]

    def value(self, dotted: str) -> Any:
        """A setting as it is stored, None where it is not."""
        here: Any = self.raw
        for part in dotted.split("."):
            here = here.get(part) if isinstance(here, dict) else None
        return here


def kind_of(path: Path) -> Literal["run", "store"]:
    """What `path` is, by the names in it.  Raises UserError for anything else."""
    if not path.exists():
        raise UserError(f"{path}: no such folder; give a run folder or a store")
    if not path.is_dir():
        raise UserError(f"{path}: is a file; give the run folder or the store that it is in")
    if any((path / name).exists() for name in RUN_FILES):
        return "run"
    if (path / "info.json").is_file() or any(path.glob("state-rank*.safetensors")):
        raise UserError(f"{path}: is a checkpoint; give its run folder, {path.resolve().parents[1]}")
    if any((path / name).is_file() for name in ("manifest.json", "plan.json")):
        return "store"
    raise UserError(
        f"{path}: is not a store of mirai_ds (it has no manifest.json) and not a run folder (it has none of "
        f"{', '.join(RUN_FILES)})"
    )


def inspect_run(run: Path, verify: bool = False) -> RunReport:
    """Read a run folder; `verify` compares the digests of all checkpoints.  Raises UserError when it is none."""
    if kind_of(run) != "run":
        raise UserError(f"{run}: is not a run folder (it has none of {', '.join(RUN_FILES)})")
    raw, notes = read_config(run)
    config, problem = _validated(raw or {}, run) if raw is not None else (None, notes)
    attempts = read_all(run)
    checkpoints = read_checkpoints(run, verify, valid_attempts(attempts))
    curve = _curve(run)
    latest, wrong_pointer = read_pointer(run)
    report = RunReport(
        path=run, config=config, raw=config.model_dump(mode="json") if config else raw or {},
        starts=read_starts(run), attempts=attempts, outcome=read_outcome(run / OUTCOME), curve=curve,
        checkpoints=checkpoints, digests_read=verify, latest=latest, leftovers=leftovers(run),
        resume=resume_point(checkpoints), samples=_names(run, "samples/*.png"),
        exports=_exports(run), nonfinite=_names(run, "nonfinite/*"), hang=_names(run, "hang/*"),
        earlier_configs=_names(run, "config.before-*.yaml"), used=folder_size(run), free=shutil.disk_usage(run).free,
    )  # fmt: skip
    torn = len(curve.unreadable)
    said = [problem, wrong_pointer, f"{METRICS}: {count_text(torn, 'unreadable line')}" if torn else ""]
    report.notes += [note for note in said if note]
    return report


def _validated(raw: Json, run: Path) -> tuple[RunConfig | None, str]:
    try:
        return build(raw, str(run / "config.yaml")), ""
    except UserError as error:
        reason = str(error).splitlines()[0]
        return None, f"the configuration is of another version or was edited, shown as it is stored ({reason})"


def _curve(run: Path) -> Curve:
    try:
        return parse_curve((run / METRICS).read_bytes())
    except OSError:
        return Curve()


def _names(run: Path, pattern: str) -> list[str]:
    return sorted(path.relative_to(run).as_posix() for path in run.glob(pattern))


def _exports(run: Path) -> list[str]:
    """Weight files and drawn tokens that somebody put into the folder."""
    names = []
    with suppress(OSError):
        names = [path.name for path in run.iterdir() if path.suffix in _EXPORTS and path.is_file()]
    return [*sorted(names), *_names(run, "samples/*.npz")]


def last_values(curve: Curve) -> dict[str, tuple[int, float]]:
    """Metric -> (step, value) of its newest record."""
    return {name: (max(values), values[max(values)]) for name, values in curve.values.items()}


def lowest_values(curve: Curve, prefix: str = "held_out/") -> dict[str, tuple[int, float]]:
    """Metric below `prefix` -> (step, value) of its lowest value; NaN is never the lowest."""
    lowest = {}
    for name, values in curve.values.items():
        finite = {step: value for step, value in values.items() if not math.isnan(value)}
        if name.startswith(prefix) and finite:
            step = min(finite, key=lambda s: (finite[s], s))
            lowest[name] = (step, finite[step])
    return lowest

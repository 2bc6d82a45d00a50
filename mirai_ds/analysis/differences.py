"""In what two runs were not the same start: settings, versions, code, ranks; and whether that explains their curves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mirai_ds.config.paths import PATHS
from mirai_ds.runs.records import Json, RunRecords, code_text, flatten

Effect = Literal["curve", "code", "rounding", "none"]

# What is written and how it is fed, never what is learned.
_NO_EFFECT = (
    "name", "output_dir", "checkpoint.", "logging.", "tracking", "eval.", "sampling.", "launch.", "data.workers",
    "data.prefetch", "data.tokenizer", "guard.nonfinite_states", "guard.hang_seconds", "guard.first_step_seconds",
    "guard.stop_deadline_seconds", "guard.max_restarts", "guard.preflight", "guard.max_clock_skew_seconds",
    "train.cuda_graph",  # a replay is the plain step to the last bit
)  # fmt: skip
# The same mathematics with sums in another order: see docs/numerics.md.
_ROUNDING = (
    "deepspeed", "train.micro_batch_size", "train.grad_accum_steps", "train.recompute.", "train.deterministic",
    "train.compile", "train.cross_entropy",
    "foresight.kernel", "world_size", "alignment_kernel", "packages.", "python", "platform", "cpu", "gpus", "cuda",
)  # fmt: skip
_CODE = ("code", "mirai_ds")
_OF_A_START = ("command", "incarnation", "unix_time")  # tell one start from another, not one run from another


class _Absent:
    def __repr__(self) -> str:
        return "(not there)"


ABSENT: Any = _Absent()


@dataclass(frozen=True)
class Difference:
    """A dotted name with both values, `ABSENT` where a run does not have it."""

    name: str
    a: Any
    b: Any
    effect: Effect


def _effect(name: str) -> Effect:
    matches = lambda names: any(name == n or (n.endswith(".") and name.startswith(n)) for n in names)  # noqa: E731
    if matches(_NO_EFFECT):
        return "none"
    if matches(_CODE):
        return "code"
    return "rounding" if matches(_ROUNDING) or name.startswith("deepspeed.") else "curve"


def _between(a: Json, b: Json) -> list[Difference]:
    flat_a, flat_b = flatten(a), flatten(b)
    values = [(name, flat_a.get(name, ABSENT), flat_b.get(name, ABSENT)) for name in dict.fromkeys([*flat_a, *flat_b])]
    return [Difference(name, left, right, _effect(name)) for name, left, right in values if _differ(left, right)]


def _differ(left: Any, right: Any) -> bool:
    """A field that an older version does not have and its empty value, or off, are the same."""
    new = right if left is ABSENT else left if right is ABSENT else ABSENT
    return bool(left != right and new not in (None, [], {}, 0))  # False and 0.0 are 0


def of_configurations(a: RunRecords, b: RunRecords) -> list[Difference] | None:
    """Settings that differ; None when one of the runs has none to compare."""
    if a.config is None or b.config is None:
        return None
    return [d for d in _between(a.config, b.config) if not (d.name in (*PATHS, "deepspeed") and _same_place(d.a, d.b))]


def _same_place(a: Any, b: Any) -> bool:
    """Whether two different paths may be one: runs of an earlier version hold them as they were given."""
    if not isinstance(a, str) or not isinstance(b, str) or Path(a).is_absolute() == Path(b).is_absolute():
        return False
    given, whole = sorted((Path(a), Path(b)), key=Path.is_absolute)
    return given.parts == whole.parts[-len(given.parts) :]


def of_environments(a: RunRecords, b: RunRecords) -> list[Difference] | None:
    """Versions, code, machine and ranks of the newest starts that differ; None when one has none to compare."""
    if a.environment is None or b.environment is None:
        return None
    left, right = ({k: v for k, v in e.items() if k not in _OF_A_START} for e in (a.environment, b.environment))
    return _between(left, right)


def explain(
    a: RunRecords,
    b: RunRecords,
    configuration: list[Difference] | None,
    environment: list[Difference] | None,
    identical: bool,
) -> list[str]:
    """Notes: what is not known, and what of the differences can be the cause of different curves."""
    notes = [*_unknown(a, b, configuration, environment), *_several_starts(a, b)]
    every = [*(configuration or []), *(environment or [])]
    curve, code, rounding = ([d.name for d in every if d.effect == kind] for kind in ("curve", "code", "rounding"))
    if identical:
        return [*notes, f"the same curve although these differ: {_list(curve)}"] if curve else notes
    if curve:
        notes.append(f"settings that shape the curve differ and explain it: {_list(curve)}")
    elif code:
        notes.append("the code differs: a change between the two can explain it")
    elif rounding:
        notes.append(
            f"only layout, versions or machine differ ({_list(rounding)}): sums are rounded in another order, which "
            "explains small differences (1e-6 at first in fp32) and no large ones"
        )
    elif configuration is not None and environment is not None:
        notes.append("settings, versions, code and ranks are the same: nothing that was recorded explains it")
    if not curve and not code and environment is not None and "+changes" in str((a.environment or {}).get("code")):
        notes.append("both ran code with changes that are in no commit: it may differ all the same")
    return notes


def _unknown(a: RunRecords, b: RunRecords, configuration: object, environment: object) -> list[str]:
    notes = []
    for letter, run in (("A", a), ("B", b)):
        missing = [
            name
            for name, there, compared in (
                ("configuration", run.config, configuration), ("environment", run.environment, environment),
            )
            if there is None and compared is None
        ]  # fmt: skip
        if missing:
            notes.append(f"{letter}: no readable {' or '.join(missing)} beside the metrics, so it is not compared")
    return notes


def _several_starts(a: RunRecords, b: RunRecords) -> list[str]:
    notes = []
    for letter, run in (("A", a), ("B", b)):
        if len(run.starts) < 2:
            continue
        for key, what, show in (("world_size", "ranks", str), ("code", "code", code_text)):
            values = list(dict.fromkeys(show(start.get(key, "unknown")) for start in run.starts))
            if len(values) > 1:
                notes.append(f"{letter}: {len(run.starts)} starts with different {what}: {', '.join(values)}")
    return notes


def _list(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")

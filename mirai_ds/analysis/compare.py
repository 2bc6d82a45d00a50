"""Are two runs the same curve?  Every metric at every step that both have, to the last digit or within a tolerance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mirai_ds.analysis.differences import Difference, explain, of_configurations, of_environments
from mirai_ds.config import UserError
from mirai_ds.config.errors import nearest
from mirai_ds.runs.records import CLOCK, Curve, RunRecords, count_text, read_run

Verdict = Literal["identical", "within", "different"]
Keys = set[tuple[int, str]]


@dataclass(frozen=True)
class Point:
    """One metric at one step in both runs."""

    step: int
    a: float
    b: float

    @property
    def same(self) -> bool:
        """Equal to the last digit; NaN equals NaN."""
        return self.a == self.b or (math.isnan(self.a) and math.isnan(self.b))

    @property
    def absolute(self) -> float:
        """|a - b|; infinite where only one is NaN or they are different infinities."""
        if self.same:
            return 0.0
        difference = abs(self.a - self.b)
        return math.inf if math.isnan(difference) else difference

    @property
    def relative(self) -> float:
        """|a - b| / max(|a|, |b|); infinite where one is not finite."""
        if self.same:
            return 0.0
        if not (math.isfinite(self.a) and math.isfinite(self.b)):
            return math.inf
        return self.absolute / max(abs(self.a), abs(self.b))


@dataclass(frozen=True)
class LastQuarter:
    """The newest quarter of a metric's common points, where noise is averaged out."""

    points: int
    first_step: int
    last_step: int
    mean_a: float
    mean_b: float
    mean_relative_difference: float  # of the points, each without its sign

    @property
    def shift(self) -> float:
        """B's mean less A's, relative to A's: 0.01 means one per cent above."""
        if self.mean_a == self.mean_b:
            return 0.0
        return (self.mean_b - self.mean_a) / abs(self.mean_a) if self.mean_a else math.inf


@dataclass(frozen=True)
class MetricComparison:
    """One metric: `first` is the first point that differs, `beyond` the first that differs by more than allowed."""

    name: str
    points: int
    differing: int
    first: Point | None
    beyond: Point | None
    largest_absolute: Point | None
    largest_relative: Point | None
    last_quarter: LastQuarter | None

    @property
    def identical(self) -> bool:
        """Whether every common point is equal to the last digit."""
        return self.first is None


@dataclass(frozen=True)
class Comparison:
    """Everything there is to say about two runs.  Steps and metrics are those the question was about."""

    a: RunRecords
    b: RunRecords
    tolerance: float
    metrics: list[MetricComparison]
    steps: list[int]  # with a point that was compared
    only_a_metrics: list[str]
    only_b_metrics: list[str]
    never_together: list[str]  # metrics that both have, but at no common step
    only_a_steps: list[int]
    only_b_steps: list[int]
    prefix: Literal["a", "b"] | None
    configuration: list[Difference] | None  # None: one of them has no configuration
    environment: list[Difference] | None
    notes: list[str] = field(default_factory=list)

    @property
    def worst(self) -> tuple[str, Point] | None:
        """Metric and point with the largest relative difference; None for identical curves."""
        points = [(m.name, m.largest_relative) for m in self.metrics if m.largest_relative is not None]
        return max(points, key=lambda item: item[1].relative, default=None)

    @property
    def first_beyond(self) -> tuple[str, Point, int] | None:
        """Metric, point, and how many metrics differ at that step: where the curves part."""
        points = [(m.name, m.beyond) for m in self.metrics if m.beyond is not None]
        if not points:
            return None
        name, point = min(points, key=lambda item: item[1].step)
        return name, point, sum(other.step == point.step for _, other in points)

    @property
    def verdict(self) -> Verdict:
        """Whether the curves are identical, within the tolerance, or different."""
        if self.first_beyond is not None:
            return "different"
        return "identical" if all(m.identical for m in self.metrics) else "within"


def compare_runs(
    run_a: Path, run_b: Path, tolerance: float = 0.0, metrics: Sequence[str] = (), from_step: int = 0
) -> Comparison:
    """Compare two run folders or metrics.jsonl files.

    tolerance: largest |a - b| / max(|a|, |b|) of a point, 0 = equal to the last digit.  metrics: only these.
    from_step: only later or equal steps.  Raises UserError when there is nothing to compare.
    """
    if not 0 <= tolerance < 1:
        raise UserError(f"--tolerance {tolerance:g}: must be at least 0 and less than 1; 0 means to the last digit")
    a, b = read_run(run_a), read_run(run_b)
    names_a, names_b = _names(a, metrics), _names(b, metrics)
    _check_known(a, b, metrics)
    shared = [name for name in names_a if name in names_b]
    compared, steps, apart = [], set[int](), []
    for name in shared:
        points = _points(a.curve, b.curve, name, from_step)
        if not points:
            apart.append(name)
            continue
        compared.append(_compare_metric(name, points, tolerance))
        steps.update(point.step for point in points)
    if not compared:
        raise UserError(_nothing_common(a, b, from_step))
    steps_a, steps_b = _steps_of(a.curve, shared, from_step), _steps_of(b.curve, shared, from_step)
    result = Comparison(
        a, b, tolerance, compared, sorted(steps),
        [name for name in names_a if name not in names_b], [name for name in names_b if name not in names_a], apart,
        sorted(steps_a - steps_b), sorted(steps_b - steps_a), _prefix(a.curve, b.curve, shared, from_step, compared),
        of_configurations(a, b), of_environments(a, b),
    )  # fmt: skip
    result.notes.extend(_reading_notes(result))
    result.notes.extend(explain(a, b, result.configuration, result.environment, result.verdict == "identical"))
    return result


def _names(run: RunRecords, wanted: Sequence[str]) -> list[str]:
    """The run's metrics in question, in the order in which they first appear."""
    return [name for name in run.curve.values if not name.startswith(CLOCK) and (not wanted or name in wanted)]


def _check_known(a: RunRecords, b: RunRecords, wanted: Sequence[str]) -> None:
    known = {name for run in (a, b) for name in run.curve.values if not name.startswith(CLOCK)}
    for name in wanted:
        if name.startswith(CLOCK):
            raise UserError(f"--metric {name}: depends on the clock or the machine and is never compared")
        if name not in known:
            raise UserError(f"--metric {name}: neither run has it; {nearest(name, known)}")
        for run, other in ((a, b), (b, a)):
            if name not in run.curve.values:
                raise UserError(f"--metric {name}: only {other.path} has it, {run.path} does not")


def _nothing_common(a: RunRecords, b: RunRecords, from_step: int) -> str:
    after = f" from step {from_step} on" if from_step else ""
    spans = [f"{run.path} has steps {run.curve.steps[0]} to {run.curve.steps[-1]}" for run in (a, b)]
    return f"no metric at any common step{after}: {'; '.join(spans)}"


def _points(a: Curve, b: Curve, name: str, from_step: int) -> list[Point]:
    there = b.values[name]
    steps = sorted(step for step in a.values[name] if step >= from_step and step in there)
    return [Point(step, a.values[name][step], there[step]) for step in steps]


def _compare_metric(name: str, points: list[Point], tolerance: float) -> MetricComparison:
    differing = [point for point in points if not point.same]
    if not differing:
        return MetricComparison(name, len(points), 0, None, None, None, None, None)
    tail = points[-math.ceil(len(points) / 4) :]
    count = len(tail)
    quarter = LastQuarter(
        count, tail[0].step, tail[-1].step, sum(p.a for p in tail) / count, sum(p.b for p in tail) / count,
        sum(p.relative for p in tail) / count,
    )  # fmt: skip
    return MetricComparison(
        name, len(points), len(differing), differing[0],
        next((point for point in differing if point.relative > tolerance), None),
        max(differing, key=lambda p: p.absolute), max(differing, key=lambda p: p.relative), quarter,
    )  # fmt: skip


def _steps_of(curve: Curve, names: Sequence[str], from_step: int) -> set[int]:
    return {step for name in names for step in curve.values[name] if step >= from_step}


def _prefix(
    a: Curve, b: Curve, names: Sequence[str], from_step: int, compared: list[MetricComparison]
) -> Literal["a", "b"] | None:
    """Which of the runs is the beginning of the other: it ends earlier, and until then both hold the same points."""
    if any(m.beyond is not None for m in compared):
        return None
    keys_a, keys_b = (
        {(step, name) for name in names for step in curve.values[name] if step >= from_step} for curve in (a, b)
    )
    pairs: list[tuple[Literal["a", "b"], Keys, Keys]] = [("a", keys_a, keys_b), ("b", keys_b, keys_a)]
    for which, short, long in pairs:
        last = max(short)[0]
        earlier = [{key for key in keys if key[0] < last} for keys in (short, long)]
        # At its last step it may have stopped between two lines.
        if last < max(long)[0] and earlier[0] == earlier[1] and short <= long:
            return which
    return None


def _reading_notes(result: Comparison) -> list[str]:
    notes = []
    for letter, run in (("A", result.a), ("B", result.b)):
        torn = run.curve.unreadable
        if torn:
            where = f"line {torn[0]}" if len(torn) == 1 else f"lines {', '.join(map(str, torn[:5]))}"
            more = ", ..." if len(torn) > 5 else ""
            notes.append(f"{letter}: {count_text(len(torn), 'unreadable line')} left out ({where}{more})")
    if result.never_together:
        notes.append(f"in both, but at no common step: {', '.join(result.never_together)}")
    return notes

"""A comparison of two runs for people (rich), for programs (JSON) and for spreadsheets (CSV)."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mirai_ds.analysis.compare import Comparison, MetricComparison, Point
from mirai_ds.analysis.differences import ABSENT, Difference
from mirai_ds.config import UserError
from mirai_ds.config.errors import shown
from mirai_ds.runs.records import Json, RunRecords, code_text, count_text, plain

if TYPE_CHECKING:
    from rich.console import RenderableType


def verdict_text(result: Comparison) -> str:
    """The answer in one line."""
    extent = f"{count_text(len(result.metrics), 'metric')}, {count_text(len(result.steps), 'step')}"
    if result.verdict == "identical":
        return f"same curve, to the last digit ({extent})"
    if result.verdict == "within":
        assert result.worst is not None
        name, point = result.worst
        largest = f"largest difference {point.relative:.2g} of {name} at step {point.step}"
        return f"same curve within {result.tolerance:g} ({largest}; {extent})"
    assert result.first_beyond is not None
    name, point, metrics = result.first_beyond
    others = f" (and {count_text(metrics - 1, 'more metric')})" if metrics > 1 else ""
    return f"different from step {point.step} on: {name}, {point.a!r}, {point.b!r}{others}"


def text_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> RenderableType:
    """A table without lines."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))  # as text: a value in brackets is no markup
    return table


def render(result: Comparison) -> list[RenderableType]:
    """What to print, one after the other."""
    from rich.text import Text

    parts: list[RenderableType] = [Text(_run_line("A", result.a)), Text(_run_line("B", result.b)), Text()]
    parts += [_metrics(result.metrics), Text()]
    differing = [m for m in result.metrics if m.last_quarter is not None]
    if differing:
        parts += [_quarters(differing), Text()]
    for title, rows in (("setting", result.configuration), ("environment", result.environment)):
        if rows:
            parts += [_differences(title, rows), Text()]
    lines = [f"note: {note}" for note in [*_extent(result), *result.notes]]
    return [*parts, *(Text(line) for line in lines), Text(verdict_text(result), style="bold")]


def _run_line(letter: str, run: RunRecords) -> str:
    steps = run.curve.steps
    return f"{letter}  {run.path}: {count_text(len(steps), 'step')} with records, {steps[0]} to {steps[-1]}"


def _metrics(metrics: Sequence[MetricComparison]) -> RenderableType:
    rows = []
    for m in metrics:
        if m.first is None or m.largest_absolute is None or m.largest_relative is None:
            rows.append((m.name, str(m.points), "none: to the last digit", "", ""))
            continue
        absolute, relative = m.largest_absolute, m.largest_relative
        first = f"{m.first.step}: {m.first.a!r}, {m.first.b!r}"
        largest = f"{absolute.absolute:.2g} (step {absolute.step})", f"{relative.relative:.2g} (step {relative.step})"
        rows.append((m.name, str(m.points), first, *largest))
    return text_table(("metric", "points", "first difference (step: A, B)", "largest", "relative"), rows)


def _quarters(metrics: Sequence[MetricComparison]) -> RenderableType:
    rows = [
        (
            m.name, f"{q.first_step} to {q.last_step}", f"{q.mean_a:.6g}", f"{q.mean_b:.6g}", f"{q.shift:+.3%}",
            f"{q.mean_relative_difference:.3%}",
        )
        for m in metrics
        if (q := m.last_quarter) is not None
    ]  # fmt: skip
    columns = ("last quarter", "steps", "mean of A", "mean of B", "B against A", "mean difference of a point")
    return text_table(columns, rows)


def _differences(title: str, rows: Sequence[Difference]) -> RenderableType:
    effects = {"none": "no effect on the curve", "rounding": "rounding only", "code": "", "curve": ""}
    cells = [(r.name, _shown(r.name, r.a), _shown(r.name, r.b), effects[r.effect]) for r in rows]
    return text_table((title, "A", "B", ""), cells)


def _shown(name: str, value: Any) -> str:
    if value is ABSENT:
        return str(value)
    return code_text(value) if name == "code" else shown(value)


def _extent(result: Comparison) -> list[str]:
    """Notes on the steps and metrics that only one of the runs has."""
    notes = []
    if result.prefix is not None:
        short, long = (result.a, result.b) if result.prefix == "a" else (result.b, result.a)
        names = ("A", "B") if result.prefix == "a" else ("B", "A")
        last, end = short.curve.steps[-1], long.curve.steps[-1]
        notes.append(f"{names[0]} is the beginning of {names[1]}: it ends at step {last}, {names[1]} at step {end}")
    for letter, steps in (("A", result.only_a_steps), ("B", result.only_b_steps)):
        if steps and result.prefix is None:
            notes.append(f"only {letter} has {count_text(len(steps), 'step')}: {steps_text(steps)}")
    for letter, metrics in (("A", result.only_a_metrics), ("B", result.only_b_metrics)):
        if metrics:
            notes.append(f"only {letter} has {', '.join(metrics)}")
    return notes


def steps_text(steps: Sequence[int], most: int = 6) -> str:
    """Steps for one line: the first few and the last."""
    if len(steps) <= most:
        return ", ".join(map(str, steps))
    return f"{', '.join(map(str, steps[: most - 1]))}, ... {steps[-1]}"


def as_json(result: Comparison) -> Json:
    """Stable keys; numbers that are not finite are the texts nan, inf and -inf, a setting that is not there is left
    out of its pair."""
    everything: Json = plain({
        "verdict": result.verdict, "text": verdict_text(result), "tolerance": result.tolerance,
        "a": _run_json(result.a), "b": _run_json(result.b),
        "steps_compared": len(result.steps),
        "metrics": [_metric_json(m) for m in result.metrics],
        "only_a": {"metrics": result.only_a_metrics, "steps": result.only_a_steps},
        "only_b": {"metrics": result.only_b_metrics, "steps": result.only_b_steps},
        "prefix": result.prefix,
        "configuration": _differences_json(result.configuration),
        "environment": _differences_json(result.environment),
        "notes": result.notes,
    })  # fmt: skip
    return everything


def _run_json(run: RunRecords) -> Json:
    steps = run.curve.steps
    return {
        "path": run.path, "steps": len(steps), "first_step": steps[0], "last_step": steps[-1],
        "unreadable_lines": run.curve.unreadable,
    }  # fmt: skip


def _metric_json(m: MetricComparison) -> Json:
    def at(p: Point | None) -> Json | None:
        return asdict(p) | {"absolute": p.absolute, "relative": p.relative} if p else None

    q = m.last_quarter
    return {
        "name": m.name, "points": m.points, "differing": m.differing, "identical": m.identical,
        "first_difference": at(m.first), "first_beyond_tolerance": at(m.beyond),
        "largest_absolute": at(m.largest_absolute), "largest_relative": at(m.largest_relative),
        "last_quarter": q and {
            "points": q.points, "first_step": q.first_step, "last_step": q.last_step, "mean_a": q.mean_a,
            "mean_b": q.mean_b, "b_against_a": q.shift, "mean_relative_difference": q.mean_relative_difference,
        },
    }  # fmt: skip


def _differences_json(rows: Sequence[Difference] | None) -> list[Json] | None:
    if rows is None:
        return None
    return [
        {"name": r.name, "effect": r.effect} | {k: v for k, v in (("a", r.a), ("b", r.b)) if v is not ABSENT}
        for r in rows
    ]


def write_csv(result: Comparison, path: Path) -> int:
    """Every compared point as a row (step, metric, a, b, absolute, relative); returns how many.  Raises UserError."""
    names = [m.name for m in result.metrics]
    a, b = result.a.curve.values, result.b.curve.values
    wanted = set(result.steps)
    points = [(Point(s, a[n][s], b[n][s]), n) for n in names for s in a[n] if s in b[n] and s in wanted]
    points.sort(key=lambda item: item[0].step)
    try:
        with path.open("w", encoding="utf-8", newline="") as file:
            out = csv.writer(file)
            out.writerow(["step", "metric", "a", "b", "absolute", "relative"])
            out.writerows(
                [p.step, name, repr(p.a), repr(p.b), repr(p.absolute), repr(p.relative)] for p, name in points
            )
    except OSError as error:
        raise UserError(f"--csv {path}: cannot be written ({error})") from None
    return len(points)

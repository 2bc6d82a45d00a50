"""Runs put into the rows of a table: a match is by what the configuration is, not by its name."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from pathlib import Path

from mirai_ds.config import RunConfig, UserError, load
from mirai_ds.config.load import TWINS
from mirai_ds.paper.catalogue import TableRow, length_text, rows_of
from mirai_ds.paper.comparable import comparable_config, differences
from mirai_ds.paper.evaluations import Evaluation, last_step, protocol_differences, read_evaluations
from mirai_ds.paper.published import STEPS_PER_EPOCH, table_key, table_title
from mirai_ds.runs.configuration import read_run_config

_NEAR = 4  # with more differences and another name, a run is no attempt at a row


@dataclass
class MeasuredRow:
    """A row with what its runs measured."""

    row: TableRow
    config: RunConfig
    twin: str = ""  # which of the recipe's twins: `@paper`, `@text`, or neither
    good: dict[Path, list[Evaluation]] = field(default_factory=dict)  # by run
    other: int = 0  # evaluations by another protocol

    @property
    def recipe(self) -> str:
        """The name of the recipe, or of its twin."""
        return self.row.recipe + self.twin

    @property
    def status(self) -> str:
        """measured, other protocol, or missing."""
        return "measured" if self.good else "other protocol" if self.other else "missing"

    def values(self, metric: str) -> list[float]:
        """One value per run: the mean over its evaluations."""
        by_run = [[e.values[metric] for e in evaluations if metric in e.values] for evaluations in self.good.values()]
        return [statistics.fmean(values) for values in by_run if values]

    def mean(self, metric: str) -> float | None:
        """The mean over runs."""
        values = self.values(metric)
        return statistics.fmean(values) if values else None

    def spread(self, metric: str) -> float | None:
        """Standard deviation over runs (n - 1), of two or more."""
        values = self.values(metric)
        return statistics.stdev(values) if len(values) > 1 else None


@dataclass(frozen=True)
class MeasuredTable:
    """A table's rows in order, and what must be said about runs and rows."""

    table: str
    rows: list[MeasuredRow]
    notes: list[str]


def measure(table: str, runs: list[Path]) -> MeasuredTable:
    """Table `table` with the evaluations of `runs`.  Raises UserError for an unknown table or what is no run folder.

    A twin's row is shown where a run is one.
    """
    key = table_key(table)
    if runs and any(row.published.flops for row in rows_of(key)):
        raise UserError(f"{table_title(key)} holds no scores, so runs cannot be put beside it; give none")
    configs = [(row, load(row.recipe)) for row in rows_of(key)]
    rows = [MeasuredRow(row, c) for row, c in configs]
    twins = {id(row): _twins(row) if c.foresight.active else [] for row, c in configs}
    notes: list[str] = []
    seen: dict[str, Path] = {}
    for run in dict.fromkeys(path.resolve() for path in runs):
        notes += _place(run, [*rows, *(m for some in twins.values() for m in some)], seen)
    shown = []
    for m in rows:
        shown += [m, *(twin for twin in twins[id(m.row)] if twin.status != "missing")]
    missing = [f'"{m.row.row}" ({length_text(m.row.steps)})' for m in shown if m.status == "missing"]
    if missing and runs:
        notes.append(f"missing: {', '.join(missing)}")
    return MeasuredTable(key, shown, notes)


def _twins(row: TableRow) -> list[MeasuredRow]:
    """A row's recipe in the paper's convention; of one head the two twins are one run."""
    first, second = (MeasuredRow(row, load(row.recipe + twin), twin) for twin in TWINS)
    return [first] if first.config.foresight.weights == second.config.foresight.weights else [first, second]


def _place(run: Path, rows: list[MeasuredRow], seen: dict[str, Path]) -> list[str]:
    """Put one run's evaluations where they belong; what there is to say.  `seen`: counted samples, by digest."""
    config = read_run_config(run)
    wrong = {id(m): _differences(config, m) for m in rows}
    same = [m for m in rows if not wrong[id(m)]]
    if not same:
        return [_nearest(run, config, rows, wrong)]
    evaluations, notes = read_evaluations(run)
    if not evaluations:
        notes.append(f"{run}: is {', '.join(dict.fromkeys(m.recipe for m in same))}, and evaluations/ holds no scores")
    for evaluation in evaluations:
        step = evaluation.step
        if step is None:
            step = last_step(config, STEPS_PER_EPOCH)
            notes.append(f"{evaluation.path}: no step is recorded; taken for the run's last, {step:,}")
        notes += _take(run, evaluation, step, same, seen)
    return notes


def _take(run: Path, evaluation: Evaluation, step: int, same: list[MeasuredRow], seen: dict[str, Path]) -> list[str]:
    """Adds an evaluation to the rows of its step; returns what is wrong with it."""
    path, fitting = evaluation.path, [m for m in same if m.row.steps == step]
    if not fitting:
        wanted = " or ".join(f"{steps:,}" for steps in sorted({m.row.steps for m in same}))
        return [f"{path}: of step {step:,}, the row's is {wanted}; left out"]
    wrong = protocol_differences(evaluation, fitting[0].config.sampling)
    if wrong:
        for m in fitting:
            m.other += 1
        return [f"{path}: another protocol: {'; '.join(wrong)}"]
    first = seen.setdefault(evaluation.samples or str(path), path)
    if first != path:
        return [f"{path}: the same samples as {first}; left out"]
    for m in fitting:
        m.good.setdefault(run, []).append(evaluation)
    return []


def _differences(config: RunConfig, m: MeasuredRow) -> list[str]:
    ours, theirs = (comparable_config(c, m.row.epochs) for c in (config, m.config))
    return differences(ours, theirs)


def _nearest(run: Path, config: RunConfig, rows: list[MeasuredRow], differing: dict[int, list[str]]) -> str:
    named = [m for m in rows if m.config.name == config.name]
    nearest = min(named or rows, key=lambda m: len(differing[id(m)]))
    wrong = differing[id(nearest)]
    if not named and len(wrong) > _NEAR:
        return f"{run}: is no row of this table (nearest: {nearest.recipe}, {len(wrong)} differences)"
    return f"{run}: is not {nearest.recipe}: {'; '.join(wrong)}"


def check_runs(runs: list[Path]) -> None:
    """Raises UserError for the first path that is no run folder."""
    for run in runs:
        if not (run / "config.yaml").is_file():
            raise UserError(f"{run}: not a run folder (it has no config.yaml)")

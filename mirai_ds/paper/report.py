"""A table of the paper beside measured numbers: for the terminal, as Markdown, as CSV."""

from __future__ import annotations

import csv
from pathlib import Path

from rich.console import RenderableType
from rich.table import Table

from mirai_ds.config import UserError
from mirai_ds.paper.catalogue import SHORT
from mirai_ds.paper.compute import (
    FLOPS_HEADINGS,
    convergence_notes,
    counted_parameters,
    flops_cells,
    millions,
    printed_parameters,
)
from mirai_ds.paper.measured import MeasuredRow, MeasuredTable
from mirai_ds.paper.published import METRICS, Row, published, table_title

NONE = "-"
PLACES = {"fid": 2, "sfid": 2, "inception_score": 2, "precision": 3, "recall": 3}
Cell = list[str]  # what the paper has; with runs also what was measured, and the difference


class Grid:
    """The cells of a table.  Beside runs all five metrics are shown, else those that the paper prints."""

    def __init__(self, table: MeasuredTable) -> None:
        self.table = table
        self.rows = published().all_tables()[table.table].rows
        self.with_runs = any(m.good or m.other for m in table.rows)
        self.flops = any(row.flops for row in self.rows)
        self.types = any(row.type for row in self.rows)
        self.parameters = any(printed_parameters(row) for row in self.rows)

    @property
    def metrics(self) -> list[str]:
        """The metrics that have a column."""
        if self.flops:
            return []
        printed = {name for row in self.rows for name in row.metrics()}
        printed |= {name for m in self.table.rows if m.row.numbers for name in m.row.numbers.values}
        return [metric for metric in METRICS if self.with_runs or metric in printed or metric == "fid"]

    @property
    def title(self) -> str:
        """What the table is, and what its cells hold."""
        said = f"{table_title(self.table.table)}: {published().all_tables()[self.table.table].title}"
        return said + (" (paper / measured / difference)" if self.with_runs else "")

    @property
    def headings(self) -> list[str]:
        """Names of the columns."""
        names = ["type"] * self.types + ["row", "epochs", "recipe"] + ["parameters, paper / here"] * self.parameters
        names += FLOPS_HEADINGS if self.flops else [SHORT[metric] for metric in self.metrics]
        return names + ["runs"] * self.with_runs

    @property
    def cells(self) -> list[list[Cell]]:
        """All rows: models that are not trained here first, as in the paper."""
        others = [self._other(row) for row in self.rows if row.recipe is None]
        return others + [self._ours(m) for m in self.table.rows]

    def _start(self, row: Row, texts: list[str], parameters: Cell) -> list[Cell]:
        start = [[row.type or ""]] * self.types + [[text] for text in texts]
        return start + [parameters] * self.parameters

    def _other(self, row: Row) -> list[Cell]:
        epochs = NONE if row.epochs is None else f"{row.epochs:g}"
        start = self._start(row, [row.label, epochs, NONE], [printed_parameters(row) or NONE])
        metrics = [[_printed(row.metrics().get(metric))] for metric in self.metrics]
        return start + metrics + [[NONE]] * self.with_runs

    def _ours(self, m: MeasuredRow) -> list[Cell]:
        row = m.row.published
        printed = printed_parameters(row)
        parameters = [printed, millions(counted_parameters(row, m.config))] if printed else [NONE]
        start = self._start(row, [m.row.row, m.row.length, m.recipe], parameters)
        if self.flops:
            return start + [[text] for text in flops_cells(row, m.config)]
        runs = [[f"{len(m.good)}" if m.good else m.status]] * self.with_runs
        return start + [self._metric(m, metric) for metric in self.metrics] + runs

    def _metric(self, m: MeasuredRow, metric: str) -> Cell:
        paper, mean, spread = _paper(m).get(metric), m.mean(metric), m.spread(metric)
        if not m.good:
            return [_printed(paper)]
        measured = _number(mean, metric) + ("" if spread is None else f" ± {_number(spread, metric)}")
        difference = difference_of(m, metric)
        return [_printed(paper), measured, NONE if difference is None else _number(difference, metric, "+")]

    @property
    def notes(self) -> list[str]:
        """What is said below the table."""
        if self.flops:
            return convergence_notes({m.row.row: m.config for m in self.table.rows})
        note = published().all_tables()[self.table.table].note
        return ([note] if note else []) + self.table.notes


def _paper(m: MeasuredRow) -> dict[str, float]:
    return m.row.numbers.values if m.row.numbers else {}


def _number(value: float | None, metric: str, sign: str = "") -> str:
    return NONE if value is None else f"{value:{sign}.{PLACES[metric]}f}"


def _printed(value: float | None) -> str:
    """Two places, as the paper has."""
    return NONE if value is None else f"{value:.2f}"


def difference_of(m: MeasuredRow, metric: str) -> float | None:
    """Measured less the paper's; None where one of them is missing."""
    paper, mean = _paper(m).get(metric), m.mean(metric)
    return None if paper is None or mean is None else mean - paper


def render(table: MeasuredTable) -> list[RenderableType]:
    """The table and its notes for a terminal; a cell's parts below each other."""
    grid = Grid(table)
    out = Table(title=grid.title, show_lines=grid.with_runs)
    for name in grid.headings:
        out.add_column(name, overflow="fold")
    for cells in grid.cells:
        out.add_row(*("\n".join(cell) if grid.with_runs else " / ".join(cell) for cell in cells))
    return [out, *grid.notes]


def markdown(table: MeasuredTable) -> str:
    """A Markdown table with its notes below."""
    grid = Grid(table)
    lines = [grid.headings, ["---"] * len(grid.headings), *([" / ".join(cell) for cell in row] for row in grid.cells)]
    text = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    notes = "".join(f"\n- {note}" for note in grid.notes)
    return f"**{grid.title}**\n\n{text}\n" + (f"{notes}\n" if notes else "")


def write_csv(table: MeasuredTable, path: Path) -> None:
    """One line a row; full precision.  Raises UserError when the file cannot be written."""
    kinds = ("paper", "measured", "spread", "difference")
    names = [f"{kind}_{metric}" for metric in METRICS for kind in kinds]
    head = ["table", "type", "row", "epochs", "recipe", "status", "runs", "paper_parameters", *names, "source"]
    lines = [
        [table_title(table.table), row.type, row.label, row.epochs, None, None, None, row.parameters]
        + [value for metric in METRICS for value in (row.metrics().get(metric), None, None, None)]
        + [published().source]
        for row in published().all_tables()[table.table].rows
        if row.recipe is None
    ]
    for m in table.rows:
        row, numbers = m.row.published, m.row.numbers
        values = [
            value
            for metric in METRICS
            for value in (_paper(m).get(metric), m.mean(metric), m.spread(metric), difference_of(m, metric))
        ]
        start = [table_title(table.table), row.type, m.row.row, f"{m.row.epochs:.10g}", m.recipe, m.status, len(m.good)]
        source = f"{published().source}, {numbers.source}" if numbers else None
        lines.append([*start, printed_parameters(row), *values, source])
    try:
        with path.open("w", newline="", encoding="utf-8") as file:
            out = csv.writer(file)
            out.writerow(head)
            out.writerows(lines)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error})") from None

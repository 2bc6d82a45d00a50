"""A table of the paper beside measured numbers: for the terminal, as Markdown, as CSV."""

from __future__ import annotations

import csv
from pathlib import Path

from rich.console import RenderableType
from rich.table import Table

from mirai_ds.config import UserError
from mirai_ds.config.paper_rows import METRICS, TABLES, table_title
from mirai_ds.paper.catalogue import SHORT, number_text
from mirai_ds.paper.measured import MeasuredRow, MeasuredTable

NONE = "-"


def title(table: MeasuredTable) -> str:
    """What the table is, and what its cells hold."""
    return f"{table_title(table.table)}: {TABLES[table.table]} (paper / measured)"


def columns(table: MeasuredTable) -> list[str]:
    """Metrics that the paper or a run has here; FID always."""
    known = {"fid"}
    for m in table.rows:
        known |= set(m.row.numbers.values() if m.row.numbers else {})
        known |= {metric for metric in METRICS if m.values(metric)}
    return [metric for metric in METRICS if metric in known]


def cells(m: MeasuredRow, metrics: list[str]) -> list[str]:
    """The cells of one row."""
    digits = {"precision": 3, "recall": 3}
    paper = m.row.numbers.values() if m.row.numbers else {}
    texts = []
    for metric in metrics:
        places, mean, spread = digits.get(metric, 2), m.mean(metric), m.spread(metric)
        theirs = f"{paper[metric]:.{places}f}" if metric in paper else NONE
        ours = (
            NONE if mean is None else f"{mean:.{places}f}" + (f" ± {spread:.{places}f}" if spread is not None else "")
        )
        texts.append(f"{theirs} / {ours}")
    runs = f"{len(m.good)}" if m.good else m.status
    return [m.row.row, f"{m.row.epochs:g}", m.recipe, *texts, runs]


def headings(metrics: list[str]) -> list[str]:
    """Names of the columns."""
    return ["row", "epochs", "recipe", *(SHORT[metric] for metric in metrics), "runs"]


def render(table: MeasuredTable) -> list[RenderableType]:
    """The table and its notes for a terminal."""
    metrics = columns(table)
    out = Table(title=title(table))
    for name in headings(metrics):
        out.add_column(name, overflow="fold")
    for m in table.rows:
        out.add_row(*cells(m, metrics))
    return [out, *table.notes]


def markdown(table: MeasuredTable) -> str:
    """A Markdown table with its notes below."""
    metrics = columns(table)
    lines = [headings(metrics), ["---"] * (len(metrics) + 4), *(cells(m, metrics) for m in table.rows)]
    text = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    notes = "".join(f"\n- {note}" for note in table.notes)
    return f"**{title(table)}**\n\n{text}\n" + (f"{notes}\n" if notes else "")


def write_csv(table: MeasuredTable, path: Path) -> None:
    """One line a row; full precision.  Raises UserError when the file cannot be written."""
    names = [f"{kind}_{metric}" for metric in METRICS for kind in ("paper", "measured", "spread")]
    try:
        with path.open("w", newline="", encoding="utf-8") as file:
            out = csv.writer(file)
            out.writerow(["table", "row", "epochs", "recipe", "status", "runs", *names, "source", "note"])
            for m in table.rows:
                paper = m.row.numbers.values() if m.row.numbers else {}
                values = [v for metric in METRICS for v in (paper.get(metric), m.mean(metric), m.spread(metric))]
                source = m.row.numbers.source if m.row.numbers else number_text(None)
                start = [table_title(table.table), m.row.row, f"{m.row.epochs:g}", m.recipe, m.status, len(m.good)]
                out.writerow([*start, *values, source, m.row.note])
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error})") from None

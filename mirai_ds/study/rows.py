"""Raw rows: what a study measured, as CSV and JSON files that tables, curves and text are made from."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from mirai_ds.config import UserError
from mirai_ds.runtime.disk import write_whole

RUNS, CURVES, COSTS = "results/study-runs.csv", "results/study-curves.csv", "results/study-costs.csv"
FACTS = "results/study-facts.json"


@dataclass(frozen=True)
class RunRow:
    """A finished run: held-out loss at its end, and what its samples and features are like (EMA weights)."""

    study: str
    arm: str
    seed: int
    steps: int
    ntp_raw: float
    ntp_ema: float
    frechet: float
    precision: float
    recall: float
    accuracy: float
    smoothness: float  # of the slots that hold a token
    smoothness_predict: float  # of the slots that predict it
    neighbour_cosine: float
    random_cosine: float


@dataclass(frozen=True)
class CurveRow:
    """A point of a run's curve."""

    study: str
    arm: str
    seed: int
    step: int
    epoch: float
    ntp_raw: float
    ntp_ema: float


@dataclass(frozen=True)
class CostRow:
    """What a step of an arm costs (`costs.measure_costs`)."""

    study: str
    arm: str
    step_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float
    flops_ratio: float
    aligned_from: float


Row = TypeVar("Row", RunRow, CurveRow, CostRow)


@dataclass(frozen=True)
class Rows:
    """All rows, and the facts of each study."""

    runs: list[RunRow]
    curves: list[CurveRow]
    costs: list[CostRow]
    facts: dict[str, dict[str, Any]]

    def studies(self) -> list[str]:
        """Names, in the order of the facts."""
        return list(self.facts)

    def replaced(self, new: Rows, study: str) -> Rows:
        """These rows with `new` in place of the rows of `study`."""
        return Rows(
            [row for row in self.runs if row.study != study] + new.runs,
            [row for row in self.curves if row.study != study] + new.curves,
            [row for row in self.costs if row.study != study] + new.costs,
            self.facts | new.facts,
        )


def to_csv(rows: Sequence[Any], kind: type) -> str:
    """CSV text with a header; numbers with 8 digits."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([field.name for field in fields(kind)])
    for row in rows:
        writer.writerow([f"{v:.8g}" if isinstance(v, float) else v for v in asdict(row).values()])
    return out.getvalue()


def from_csv(path: Path, kind: type[Row]) -> list[Row]:
    """Reads rows.  Raises UserError for a file that is missing or holds something else."""
    try:
        lines = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; `mirai-ds study rows` writes it") from None
    names = {field.name: {"int": int, "float": float}.get(str(field.type), str) for field in fields(kind)}
    rows = []
    for number, line in enumerate(lines, start=2):
        try:
            if set(line) != set(names):
                raise ValueError(f"columns must be {', '.join(names)}")
            rows.append(kind(**{name: convert(line[name]) for name, convert in names.items()}))
        except (TypeError, ValueError) as error:
            raise UserError(f"{path}, line {number}: {error}") from None
    return rows


def write_rows(rows: Rows, folder: Path) -> None:
    """Writes the four files."""
    (folder / FACTS).parent.mkdir(parents=True, exist_ok=True)
    for name, part, kind in ((RUNS, rows.runs, RunRow), (CURVES, rows.curves, CurveRow), (COSTS, rows.costs, CostRow)):
        write_whole(folder / name, to_csv(part, kind))
    write_whole(folder / FACTS, json.dumps(rows.facts, indent=1) + "\n")


def read_rows(folder: Path) -> Rows:
    """What `write_rows` wrote.  Raises UserError."""
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / FACTS}: cannot be read ({error}); `mirai-ds study rows` writes it") from None
    return Rows(
        from_csv(folder / RUNS, RunRow), from_csv(folder / CURVES, CurveRow), from_csv(folder / COSTS, CostRow), facts
    )

"""Puts results of `make gpu-check` into docs/results/gpu.csv and from there into the tables of the documentation.

python -m tests.gpu.check.import_results FOLDER...     folders with rows.jsonl
python -m tests.gpu.check.import_results               only make the tables anew
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterable
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from tests.gpu.check import pages
from tests.gpu.check.facts import ROOT
from tests.gpu.check.native_rows import COLUMNS, FAKE

CSV = ROOT / "docs" / "results" / "gpu.csv"
MEASURED = ("date", "driver", "deepspeed", "value", "unit")  # what a row says anew when it was measured again
Key = tuple[str, ...]


class RefusedError(ValueError):
    """Rows that must not be imported; one line a reason."""


class ResultRow(BaseModel):
    """A value that was measured on a real GPU."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    date: str = Field(pattern=r"^\d{4}-\d{2}-\d{2}$")
    card: str = Field(min_length=1)
    driver: str = ""
    torch: str = Field(min_length=1)
    deepspeed: str = ""
    commit: str = Field(pattern=r"^([0-9a-f]{7,40}|unknown)(\+changes)?$")
    command: str = Field(min_length=1)
    slice: str = ""
    subject: str = Field(min_length=1)
    model: str = ""
    method: str = ""
    batch: str = Field(default="", pattern=r"^\d*$")
    precision: str = ""
    variant: str = ""
    metric: str = Field(min_length=1)
    value: str
    unit: str = ""
    fake: bool = Field(default=False, exclude=True)

    @field_validator("value")
    @classmethod
    def _a_number(cls, value: str) -> str:
        float(value)  # a ValueError is pydantic's to tell
        return value

    @model_validator(mode="after")
    def _real(self) -> ResultRow:
        if self.fake or FAKE in self.card:
            raise ValueError(f"a row of {self.card}: a fake device measures nothing")
        return self

    @property
    def key(self) -> Key:
        """Rows with the same key are the same measurement; the later one counts."""
        return tuple(getattr(self, name) for name in COLUMNS if name not in MEASURED)


def read_folder(folder: Path) -> list[ResultRow]:
    """Rows of a results folder.  Raises RefusedError, naming lines, when one is not what it must be: none is taken."""
    path = folder / "rows.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise RefusedError(f"{path}: {error.strerror}") from None
    found, wrong = [], []
    for number, line in enumerate(lines, 1):
        try:
            found.append(ResultRow.model_validate(json.loads(line)))
        except ValidationError as error:
            told = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'row'}: {e['msg']}" for e in error.errors())
            wrong.append(f"{path}:{number}: {told}")
        except ValueError as error:
            wrong.append(f"{path}:{number}: not JSON: {error}")
    if wrong:
        raise RefusedError("\n".join(wrong[:5] + ([f"and {len(wrong) - 5} more"] if len(wrong) > 5 else [])))
    return found


def read_table(path: Path = CSV) -> list[ResultRow]:
    """Rows of the committed table.  Raises RefusedError when its columns are others."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise RefusedError(f"{path}: its columns are not {', '.join(COLUMNS)}")
        return [ResultRow.model_validate(row) for row in reader]


def merged(old: Iterable[ResultRow], new: Iterable[ResultRow]) -> list[ResultRow]:
    """Old rows in their order, each replaced by a new one of its key, then the other new ones."""
    found = {row.key: row for row in old}
    return list({**found, **{row.key: row for row in new}}.values())


def write_table(rows: Iterable[ResultRow], path: Path = CSV) -> None:
    """The whole table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(row.model_dump() for row in rows)


def main(argv: list[str] | None = None) -> int:
    """Import and write; 2 when rows are refused."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.check.import_results", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER")
    parser.add_argument("--csv", type=Path, default=CSV, help="the table (default: docs/results/gpu.csv)")
    parser.add_argument("--root", type=Path, default=ROOT, help="where README.md and docs/ are")
    args = parser.parse_args(argv)
    try:
        old = read_table(args.csv)
        new = [row for folder in args.folders for row in read_folder(folder)]
    except RefusedError as error:
        print(f"refused, nothing was imported:\n{error}", file=sys.stderr)
        return 2
    rows = merged(old, new)
    write_table(rows, args.csv)
    changed = pages.write(args.root, [row.model_dump() for row in rows])
    print(f"{len(new)} rows read, {len(rows)} in the table (there were {len(old)}); pages changed: {changed or 'none'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

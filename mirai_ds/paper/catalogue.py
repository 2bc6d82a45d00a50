"""The rows of the paper's tables, read from the shipped recipes; the recipes' header comments and docs/recipes.md.

`python -m mirai_ds.paper.catalogue` prints the tables of docs/recipes.md; with `--write` it puts them and the
headers into the source tree.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from mirai_ds.config import UserError
from mirai_ds.config.errors import nearest
from mirai_ds.config.load import TWIN, load, paper_entry, read_recipe, recipe_names, recipe_text
from mirai_ds.config.paper_rows import TABLES, PaperEntry, PaperNumbers, table_title
from mirai_ds.runtime import markdown

# floor(1,281,167 images / batch of 256): LlamaGen's loader drops the rest.
STEPS_PER_EPOCH = 5004
NOT_AT_HAND = "not at hand"
SHORT = {"fid": "FID", "sfid": "sFID", "inception_score": "IS", "precision": "P", "recall": "R"}


@dataclass(frozen=True)
class TableRow:
    """One row of a table at one number of epochs."""

    table: str
    row: str
    recipe: str
    epochs: float
    whole: bool  # the run's whole length, not a mark on the way
    numbers: PaperNumbers | None
    note: str | None

    @property
    def steps(self) -> int:
        """Optimizer steps of these epochs on ImageNet."""
        return round(self.epochs * STEPS_PER_EPOCH)

    @property
    def command(self) -> str:
        """The command that trains exactly this row."""
        stop = "" if self.whole else f" --set train.max_steps={self.steps}"
        return f"mirai-ds train {self.recipe}{stop}"


def table_key(text: str) -> str:
    """The key of a table as people write it: 3, `table 3`, Fig. 7, fig7.  Raises UserError."""
    key = re.sub(r"^(table|tab\.?)\s*", "", text.strip().lower())
    key = re.sub(r"^fig(ure|\.)?\s*", "fig", key)
    if key not in TABLES:
        raise UserError(f"table {text!r}: no recipe is a row of it; {nearest(key, TABLES)}")
    return key


@cache
def all_rows() -> tuple[TableRow, ...]:
    """Every row of every table, recipes by name."""
    rows = []
    for name in recipe_names():
        entry = paper_entry(name)
        if entry is None:
            continue
        whole = run_epochs(name)
        for row in entry.rows:
            for epochs in row.epochs or [whole]:
                numbers = numbers_of(entry, epochs)
                rows.append(TableRow(row.table, row.row, name, epochs, epochs == whole, numbers, row.note))
    return tuple(rows)


def rows_of(table: str) -> list[TableRow]:
    """The rows of one table (a key): baselines first, then by label, numbers in it by value, then by epochs."""

    def order(row: TableRow) -> tuple[bool, list[tuple[int, str]], float]:
        parts = re.split(r"(\d+)", row.row)
        return _method(row.recipe) != "none", [(int(p), "") if p.isdigit() else (-1, p) for p in parts], row.epochs

    return sorted((row for row in all_rows() if row.table == table), key=order)


def _method(name: str) -> str:
    return str(read_recipe(name).get("foresight", {}).get("method", "none"))


def run_epochs(name: str) -> float:
    """`train.epochs` of a recipe, without validating it."""
    return float(read_recipe(name).get("train", {}).get("epochs", 300))


def numbers_of(entry: PaperEntry, epochs: float) -> PaperNumbers | None:
    """What the paper has of a run after `epochs`; followed to the recipe that a name points at."""
    numbers = entry.numbers.get(int(epochs)) if epochs == int(epochs) else None
    while numbers is not None and numbers.of is not None:
        other = paper_entry(numbers.of)
        numbers = other.numbers.get(int(epochs)) if other else None
    return numbers


def number_text(numbers: PaperNumbers | None) -> str:
    """`FID 5.22, IS 197.14 (arXiv ...)`, or that there are none."""
    if numbers is None or not numbers.values():
        return NOT_AT_HAND
    return f"{', '.join(f'{SHORT[k]} {v:.2f}' for k, v in numbers.values().items())} ({numbers.source})"


# --- header comments -----------------------------------------------------------------------------------------------


def header(name: str) -> str:
    """The comment at the top of a recipe: its first line as it is, the rest made from the recipe."""
    first = recipe_text(name).splitlines()[0]
    data = read_recipe(name)
    rows = [row for row in all_rows() if row.recipe == name]
    epochs, batch = run_epochs(name), data["train"]["global_batch_size"]
    places = " and ".join(str(data["data"][key]) for key in ("path", "images") if key in data["data"])
    lines = [
        ("Command", f"mirai-ds train {name}"),
        ("Data", f"{places}: ImageNet through `mirai-ds extract` (docs/data.md)"),
        ("Hardware", f"the paper's: 8 A100; any number of ranks that divides the batch of {batch}"),
        ("Steps", f"{round(epochs * STEPS_PER_EPOCH):,} ({epochs:g} epochs of {STEPS_PER_EPOCH:,})"),
    ]
    for table, row in dict.fromkeys((row.table, row.row) for row in rows):
        note = next(r.note for r in rows if (r.table, r.row) == (table, row))
        lines.append(("Row", f'{table_title(table)} "{row}"' + (f" ({note})" if note else "")))
    for mark, numbers in sorted({row.epochs: row.numbers for row in rows}.items()):
        cfg = data["sampling"]["cfg_scale"]
        lines.append(
            ("Expect", f"after {mark:g} epochs, cfg {cfg:g}, 50,000 images of the EMA: {number_text(numbers)}")
        )
    if _method(name) != "none":
        lines.append(("Twin", _twin_text(name)))
    named = [(key if i == 0 or lines[i - 1][0] != key else "", value) for i, (key, value) in enumerate(lines)]
    return "\n".join([first, "#", *(f"# {key + ':' if key else '':10} {value}" for key, value in named)])


def _twin_text(name: str) -> str:
    ours, theirs = load(name).foresight, load(name + TWIN).foresight
    each = " each" if ours.heads > 1 else ""
    return (
        f"{name}{TWIN}, the text's convention: a mean over heads, so lambda {(theirs.weights or [0])[0]:g}{each} for "
        f"the same total, {sum(ours.weights or []):g}"
    )


def with_header(text: str, comment: str) -> str:
    """A recipe's text with the comment at its top replaced."""
    lines = text.splitlines()
    body = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join([comment, *lines[body:]]) + "\n"


# --- docs/recipes.md -----------------------------------------------------------------------------------------------

BEGIN, END = "<!-- python -m mirai_ds.paper.catalogue -->", "<!-- end -->"


def page() -> str:
    """All tables as Markdown."""
    parts = []
    for table, title in TABLES.items():
        lines = []
        for row in rows_of(table):
            stop = "" if row.whole else f"<br>`--set train.max_steps={row.steps}`"
            note = f"; {row.note}" if row.note else ""
            lines.append(f"{row.row} | {row.epochs:g} | `{row.recipe}`{stop} | {number_text(row.numbers)}{note}")
        listed = markdown.table("row | epochs | recipe | paper", lines)
        parts.append(f"### {table_title(table)}: {title}\n\n{listed}\n")
    return "\n".join(parts)


def main() -> None:
    """Prints the tables, or writes them into the source tree that this module lies in."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    if not parser.parse_args().write:
        print(page())
        return
    root = Path(__file__).resolve().parents[2]
    for path in sorted((root / "mirai_ds" / "config" / "recipes").glob("*/*.yaml")):
        if paper_entry(path.stem) is not None:
            path.write_text(with_header(recipe_text(path.stem), header(path.stem)), encoding="utf-8")
    document = root / "docs" / "recipes.md"
    text = markdown.replaced(document.read_text(encoding="utf-8"), BEGIN, page(), END, document)
    document.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

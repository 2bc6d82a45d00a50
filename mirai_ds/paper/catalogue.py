"""The rows of the paper's tables beside the recipes that train them; the recipes' header comments and docs/recipes.md.

`python -m mirai_ds.paper.catalogue` prints the tables of docs/recipes.md; with `--write` it puts them and the
headers into the source tree.
"""

from __future__ import annotations

import argparse
import shlex
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from mirai_ds.config.load import TWIN, load, read_recipe, recipe_names, recipe_text
from mirai_ds.paper.published import (
    STEPS_PER_EPOCH,
    Choice,
    Row,
    Table,
    choices_of,
    published,
    setting_of,
    table_title,
)
from mirai_ds.runtime import markdown

SHORT = {"fid": "FID", "sfid": "sFID", "inception_score": "IS", "precision": "P", "recall": "R"}
ONLY_IN_THE_PICTURE = "only in the picture"


@dataclass(frozen=True)
class Numbers:
    """What the paper prints for a run after some steps, and in which tables."""

    values: dict[str, float]
    tables: tuple[str, ...]

    @property
    def source(self) -> str:
        """`Table 3` or `Tables 3, 6`."""
        return f"Table{'s' if len(self.tables) > 1 else ''} {', '.join(self.tables)}"


@dataclass(frozen=True)
class TableRow:
    """One row of a table at one point of its run.

    steps: of the optimizer on ImageNet.  whole: the run's end, not a mark on the way.  numbers: None where the paper
    prints none.
    """

    table: str
    published: Row
    recipe: str
    steps: int
    whole: bool
    numbers: Numbers | None
    choices: tuple[Choice, ...]

    @property
    def row(self) -> str:
        """The row's label."""
        return self.published.label

    @property
    def epochs(self) -> float:
        """The steps in epochs of ImageNet."""
        return self.steps / STEPS_PER_EPOCH

    @property
    def length(self) -> str:
        """The point of the run as the paper says it: `80` epochs, or `50,000 steps`."""
        return length_text(self.steps).removesuffix(" epochs")

    @property
    def command(self) -> str:
        """The command that trains exactly this row."""
        stop = "" if self.whole else f" --set train.max_steps={self.steps}"
        return f"mirai-ds train {self.recipe}{stop}"


def length_text(steps: int) -> str:
    """`80 epochs`, or `50,000 steps` where that is no whole number of epochs."""
    epochs, rest = divmod(steps, STEPS_PER_EPOCH)
    return f"{steps:,} steps" if rest else f"{epochs} epochs"


def run_steps(name: str) -> int:
    """Steps of a recipe on ImageNet, without validating it."""
    train = read_recipe(name).get("train", {})
    steps = round(float(train.get("epochs", 300)) * STEPS_PER_EPOCH)
    return min(steps, train.get("max_steps") or steps)


def _marks(table: Table, row: Row, whole: int) -> list[int]:
    """The steps at which a row's run is judged."""
    for epochs, steps in ((row.marks, row.marks_in_steps), (table.marks, table.marks_in_steps)):
        if steps is not None:
            return steps
        if epochs is not None:
            return [round(mark * STEPS_PER_EPOCH) for mark in epochs]
    return [whole]


@cache
def all_rows() -> tuple[TableRow, ...]:
    """Every row that has a recipe, in the order of the paper."""
    rows = []
    for key, table in published().all_tables().items():
        for row in table.rows:
            if row.recipe is None:
                continue
            whole, choices = run_steps(row.recipe), tuple(choices_of(setting_of(table, row)))
            for steps in _marks(table, row, whole):
                numbers = numbers_of(row.recipe, steps)
                rows.append(TableRow(key, row, row.recipe, steps, steps == whole, numbers, choices))
    return tuple(rows)


def rows_of(table: str) -> list[TableRow]:
    """The rows of one table (a key)."""
    return [row for row in all_rows() if row.table == table]


def paper_recipes() -> list[str]:
    """The recipes that are a row of a table or a series of a figure."""
    used = {row.recipe for row in all_rows()}
    return [name for name in recipe_names() if name in used]


@cache
def _printed() -> dict[tuple[str, int], Numbers]:
    """Every run's numbers at its end, from all tables that print some."""
    found: dict[tuple[str, int], Numbers] = {}
    for key, table in published().tables.items():
        for row in table.rows:
            if row.recipe is None or not row.metrics():
                continue
            place = row.recipe, run_steps(row.recipe)
            known = found.get(place, Numbers({}, ()))
            found[place] = Numbers({**known.values, **row.metrics()}, (*known.tables, key))
    return found


def numbers_of(recipe: str, steps: int) -> Numbers | None:
    """What the paper prints of a recipe's run after `steps`, also where it prints it of a shorter run that is the same
    up to there."""
    numbers = _printed().get((recipe, steps))
    shorter = published().begins_as.get(recipe)
    return numbers_of(shorter, steps) if numbers is None and shorter is not None else numbers


def numbers_at_marks(recipe: str) -> list[tuple[int, Numbers]]:
    """(steps, numbers) of a recipe's run wherever the paper prints any."""
    marks = sorted({steps for _, steps in _printed()})
    found = [(steps, numbers_of(recipe, steps)) for steps in marks if steps <= run_steps(recipe)]
    return [(steps, numbers) for steps, numbers in found if numbers is not None]


def number_text(numbers: Numbers | None) -> str:
    """`FID 5.22, IS 197.14`, or that the paper prints none."""
    if numbers is None:
        return ONLY_IN_THE_PICTURE
    return ", ".join(f"{SHORT[name]} {value:.2f}" for name, value in numbers.values.items())


def flops_text(row: Row) -> str:
    """Table 13's cells: `1.81e+11 FLOPs an image (+6.6 %)`."""
    return f"{row.flops:.2e} FLOPs an image" + (f" ({row.overhead_percent:+.1f} %)" if row.overhead_percent else "")


# --- header comments -----------------------------------------------------------------------------------------------


def header(name: str) -> str:
    """The comment at the top of a recipe: its first line as it is, the rest made from the recipe and the paper."""
    first = recipe_text(name).splitlines()[0]
    data = read_recipe(name)
    rows = [row for row in all_rows() if row.recipe == name]
    steps, batch = run_steps(name), data["train"]["global_batch_size"]
    places = " and ".join(str(data["data"][key]) for key in ("path", "images") if key in data["data"])
    lines = [
        ("Command", f"mirai-ds train {name}"),
        ("Data", f"{places}: ImageNet through `mirai-ds extract` (docs/data.md)"),
        ("Hardware", f"the paper's: 8 A100; any number of ranks that divides the batch of {batch}"),
        ("Steps", f"{steps:,} ({steps / STEPS_PER_EPOCH:.4g} epochs of {STEPS_PER_EPOCH:,})"),
    ]
    lines += [("Row", f'{table_title(row.table)} "{row.row}"') for row in _once(rows)]
    if not rows:
        lines.append(("Row", "none: the paper has no such run"))
    for choice in choices_among(rows):
        lines += [("Follows", line) for line in choice_lines(choice)]
    lines += [("Expect", text) for text in _expected(rows, data["sampling"]["cfg_scale"])]
    if _method(name) != "none":
        lines.append(("Twin", _twin_text(name)))
    named = [(key if i == 0 or lines[i - 1][0] != key else "", value) for i, (key, value) in enumerate(lines)]
    return "\n".join([first, "#", *(f"# {key + ':' if key else '':10} {value}" for key, value in named)])


def _once(rows: list[TableRow]) -> list[TableRow]:
    """Without the marks of one run."""
    return list({(row.table, row.row): row for row in rows}.values())


def choices_among(rows: list[TableRow]) -> list[Choice]:
    """The open questions of some rows, each once."""
    return list({choice.question: choice for row in rows for choice in row.choices}.values())


def choice_lines(choice: Choice) -> list[str]:
    """What a recipe follows, why, and how to have the other reading."""
    return [
        f"{choice.question}: {choice.follows}",
        f"  because {choice.why}",
        f"  otherwise {choice.other}: {overrides(choice)}",
    ]


def overrides(choice: Choice) -> str:
    """The options of the command line that make the other reading."""
    return " ".join(f"--set {shlex.quote(override)}" for override in choice.set)


def _expected(rows: list[TableRow], cfg: float) -> list[str]:
    """The printed numbers of a run at its marks."""
    found = {row.steps: row.numbers for row in rows if row.numbers is not None}
    if not found:
        return ["the paper's numbers are only in the picture"] if rows else []
    return [
        f"after {length_text(steps)}, cfg {cfg:g}, 50,000 images of the EMA: {number_text(numbers)} ({numbers.source})"
        for steps, numbers in sorted(found.items())
    ]


def _method(name: str) -> str:
    return str(read_recipe(name).get("foresight", {}).get("method", "none"))


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
    """All tables, the open questions and what is beyond the paper, as Markdown."""
    parts = [_table_part(key, table) for key, table in published().all_tables().items()]
    return "\n".join([*parts, _choices_part(), _beyond_part()])


def _table_part(key: str, table: Table) -> str:
    others = [row for row in table.rows if row.recipe is None]
    lines = [
        f"{row.label} | {f'{row.epochs:g}' if row.epochs else '-'} | - | {number_text(Numbers(row.metrics(), ()))}"
        for row in others
    ]
    for row in rows_of(key):
        stop = "" if row.whole else f"<br>`--set train.max_steps={row.steps}`"
        numbers = flops_text(row.published) if row.published.flops else number_text(row.numbers)
        lines.append(f"{row.row} | {row.length} | `{row.recipe}`{stop} | {numbers}")
    listed = markdown.table("row | epochs | recipe | paper", lines)
    note = f"\n{table.note[0].upper()}{table.note[1:]}.\n" if table.note else ""
    return f"### {table_title(key)}: {table.title}\n\n{listed}\n{note}"


def _choices_part() -> str:
    lines = [
        f"{choice.question} | {choice.follows} | {choice.why} | {choice.other}<br>`{overrides(choice)}`"
        for choice in published().choices.values()
    ]
    listed = markdown.table("question | the recipes follow | because | the other reading", lines)
    return f"### What the paper leaves open\n\n{listed}\n"


def _beyond_part() -> str:
    lines = [f"{row.label} | `{row.recipe}`" for row in published().beyond]
    return f"### Beyond the paper\n\n{markdown.table('run | recipe', lines)}\n"


def with_tables(document: str, name: str) -> str:
    """docs/recipes.md with its tables made anew."""
    return markdown.replaced(document, BEGIN, page(), END, name)


def with_budget(document: str, name: str) -> str:
    """docs/reproducing.md with its tables made anew."""
    from mirai_ds.paper import budget  # here: it imports this file

    for part, made in (("budget", budget.budget()), ("marks", budget.marks())):
        document = markdown.replaced(
            document, f"<!-- mirai_ds.paper.budget {part} -->", made, f"<!-- end {part} -->", name
        )
    return document


DOCUMENTS = {"recipes.md": with_tables, "reproducing.md": with_budget}


def main() -> None:
    """Prints the tables, or writes them into the source tree that this module lies in."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    if not parser.parse_args().write:
        print(page())
        return
    root = Path(__file__).resolve().parents[2]
    known = {*paper_recipes(), *(row.recipe for row in published().beyond)}
    for path in sorted((root / "mirai_ds" / "config" / "recipes").glob("*/*.yaml")):
        if path.stem in known:
            path.write_text(with_header(recipe_text(path.stem), header(path.stem)), encoding="utf-8")
    for name, write in DOCUMENTS.items():
        document = root / "docs" / name
        document.write_text(write(document.read_text(encoding="utf-8"), name), encoding="utf-8")


if __name__ == "__main__":
    main()

"""The rows of the paper's tables beside the recipes that train them, and what the paper prints of a run."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from functools import cache

from mirai_ds.config.load import read_recipe, recipe_names
from mirai_ds.paper.published import (
    STEPS_PER_EPOCH,
    Choice,
    Row,
    Table,
    choices_of,
    published,
    setting_of,
)

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

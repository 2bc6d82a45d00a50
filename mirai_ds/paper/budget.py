"""Days and disk of the runs of Table 6, from `plan`, and the printed numbers at their marks: docs/reproducing.md."""

from __future__ import annotations

from mirai_ds.paper.catalogue import SHORT, TableRow, numbers_of, rows_of
from mirai_ds.paper.published import STEPS_PER_EPOCH
from mirai_ds.planning.plan import PlanRequest, make_plan
from mirai_ds.runtime import markdown

DEVICES = ("a100-80g", "h100-80g")
MARKS = (40, 80, 160, 300)


def budget() -> str:
    """One row a recipe of Table 6: days on eight GPUs, a checkpoint's size, all that are kept."""
    rows = []
    for row in rows_of("6"):
        plans = [make_plan(PlanRequest(row.recipe, 1, 8, name), other_choices=False) for name in DEVICES]
        spans = [plan.run_seconds() for plan in plans]
        days = ["-" if span is None else f"{span[0] / 86400:.1f} to {span[1] / 86400:.1f}" for span in spans]
        size, kept = plans[0].checkpoint / 1e9, plans[0].kept
        rows.append(f"`{row.recipe}` | {' | '.join(days)} | {size:.1f} GB | {kept * size:.0f} GB")
    head = "recipe | days, 8 x A100-80G | days, 8 x H100 | a checkpoint | disk for all that are kept"
    return markdown.table(head, rows, "lrrrr")


def marks() -> str:
    """One row a run of Table 6: what the paper prints of it at the marks of Fig. 7."""
    rows = [f"`{row.recipe}` | {' | '.join(_at(row, epochs) for epochs in MARKS)}" for row in rows_of("6")]
    return markdown.table(f"recipe | {' | '.join(f'{epochs} epochs' for epochs in MARKS)}", rows, "lrrrr")


def _at(row: TableRow, epochs: int) -> str:
    numbers = numbers_of(row.recipe, epochs * STEPS_PER_EPOCH)
    if numbers is None:
        return "picture"
    shown = [f"{SHORT[name]} {numbers.values[name]:.2f}" for name in ("fid", "inception_score")]
    return ", ".join(shown)

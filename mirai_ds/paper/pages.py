"""What is written from the paper's data: recipes' header comments, docs/recipes.md and docs/reproducing.md.

`python -m mirai_ds.paper.pages` prints the tables of docs/recipes.md; with `--write` it puts all of it into the source
tree.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mirai_ds.config.load import TEXT, TWIN, load, read_recipe, recipe_text
from mirai_ds.paper import budget
from mirai_ds.paper.catalogue import (
    Numbers,
    TableRow,
    all_rows,
    choice_lines,
    choices_among,
    flops_text,
    length_text,
    number_text,
    overrides,
    paper_recipes,
    rows_of,
    run_steps,
)
from mirai_ds.paper.published import STEPS_PER_EPOCH, Table, published, table_title
from mirai_ds.runtime import markdown

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
        f"the same total, {sum(ours.weights or []):g}" + (f"; {name}{TEXT} with lambda as it is" if each else "")
    )


def with_header(text: str, comment: str) -> str:
    """A recipe's text with the comment at its top replaced."""
    lines = text.splitlines()
    body = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join([comment, *lines[body:]]) + "\n"


# --- docs/recipes.md -----------------------------------------------------------------------------------------------

BEGIN, END = "<!-- python -m mirai_ds.paper.pages -->", "<!-- end -->"


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

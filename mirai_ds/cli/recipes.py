"""`mirai-ds recipes` and `table`: what can be trained, and what was, beside the paper.  Heavy modules inside verbs."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from mirai_ds.cli.errors import CONTEXT, mistakes_in_one_line

PATH = click.Path(path_type=Path)
TABLE = click.option("--table", metavar="3|fig7", help="Only the rows of this table or figure of the paper.")


@click.group(context_settings=CONTEXT, invoke_without_command=True)
@TABLE
@click.pass_context
@mistakes_in_one_line
def recipes(context: click.Context, table: str | None) -> None:
    """List and show the recipes that ship with mirai_ds; `--table 3` lists those of a table of the paper."""
    if context.invoked_subcommand is None:
        if table is None:
            click.echo(context.get_help())
        else:
            click.echo("\n".join(_of_table(table)))
    elif table is not None:
        from mirai_ds.config.errors import UserError

        raise UserError(f"--table {table}: give it alone, or after `list`")


@recipes.command("list")
@TABLE
@mistakes_in_one_line
def recipes_list(table: str | None) -> None:
    """Names, methods, sizes and tables; NAME@paper and NAME@text are a recipe's twins in the paper's convention.

    \b
    Example:
      mirai-ds recipes list --table 1
    """
    click.echo("\n".join(_all() if table is None else _of_table(table)))


def _all() -> list[str]:
    from mirai_ds.config.load import read_recipe, recipe_names, recipe_text
    from mirai_ds.paper.catalogue import all_rows
    from mirai_ds.paper.published import published, table_title

    beyond = {row.recipe for row in published().beyond}
    lines = []
    for name in recipe_names():
        data = read_recipe(name)
        tables = dict.fromkeys(table_title(row.table) for row in all_rows() if row.recipe == name)
        where = f" ({', '.join(tables)})" if tables else " (beyond the paper)" if name in beyond else ""
        method, size = data.get("foresight", {}).get("method", "none"), data["model"]["size"]
        lines.append(f"{name:27} {method:9} {size:8} {recipe_text(name).splitlines()[0].lstrip('# ')}{where}")
    return lines


def _of_table(table: str) -> list[str]:
    from mirai_ds.paper.catalogue import choice_lines, choices_among, flops_text, number_text, rows_of
    from mirai_ds.paper.published import published, table_key, table_title

    key = table_key(table)
    rows = rows_of(key)
    lines = [f"{table_title(key)}: {published().all_tables()[key].title}"]
    for row in rows:
        length = f"{row.epochs:g} epochs ({row.steps:,} steps)" if row.length.isdigit() else row.length
        numbers = flops_text(row.published) if row.published.flops else number_text(row.numbers)
        lines += [f"{row.row}, {length}: paper {numbers}", f"    {row.command}"]
    note = published().all_tables()[key].note
    lines += [f"note: {note}"] if note else []
    for choice in choices_among(rows):
        lines += choice_lines(choice)
    return lines


@recipes.command("show")
@click.argument("name")
@click.option("--resolved", is_flag=True, help="Every field written out, with its meaning as a comment.")
@mistakes_in_one_line
def recipes_show(name: str, resolved: bool) -> None:
    """Print a recipe; copy it to a file and edit it to make your own.

    \b
    Example:
      mirai-ds recipes show digits-mirai-e --resolved > mine.yaml
    """
    from mirai_ds.config.load import TWINS, load, recipe_text
    from mirai_ds.config.reference import explained

    click.echo(explained(load(name)) if resolved or name.endswith(TWINS) else recipe_text(name), nl=False)


@click.command(context_settings=CONTEXT)
@click.argument("table")
@click.argument("runs", nargs=-1, type=PATH)
@click.option("--markdown", "as_markdown", is_flag=True, help="Print Markdown.")
@click.option("--csv", "csv_file", type=PATH, metavar="FILE", help="Write every number as CSV too.")
@mistakes_in_one_line
def table(table: str, runs: tuple[Path, ...], as_markdown: bool, csv_file: Path | None) -> None:
    """TABLE of the paper (3, or fig7) with the numbers of RUNS beside it.

    A run is put into the row whose recipe has the same configuration, whatever its name; its numbers are those of
    `mirai-ds evaluate ... --json RUN/evaluations/NAME.json`, of the row's step and by the paper's protocol (50,000
    images, the standard reference, the recipe's guidance, EMA weights).  Several runs of a row, such as seeds, give a
    mean and a spread.  What is missing, or was measured otherwise, is listed.

    \b
    Example:
      mirai-ds table 1 runs/llamagen-b-80 runs/mirai-e-b-80 --csv table1.csv
    """
    from mirai_ds.paper import report
    from mirai_ds.paper.measured import check_runs, measure

    check_runs(list(runs))
    measured = measure(table, list(runs))
    if csv_file is not None:
        report.write_csv(measured, csv_file)
    if as_markdown:
        click.echo(report.markdown(measured), nl=False)
        return
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    for part in report.render(measured):
        console.print(part, soft_wrap=isinstance(part, str), markup=False)

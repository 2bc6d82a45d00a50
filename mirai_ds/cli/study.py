"""`mirai-ds study`: does alignment work?  Heavy modules are imported inside the verbs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click

from mirai_ds.cli.errors import CONTEXT, mistakes_in_one_line

PATH = click.Path(path_type=Path)
OPTIONS = (
    click.argument("name", metavar="digits|fashion"),
    click.option("--arms", metavar="NAME,NAME|main", help="Default all; the baseline is always among them."),
    click.option("--seeds", type=click.IntRange(min=1), help="Runs of each arm; default the study's."),
    click.option("--budget-hours", type=click.FloatRange(min=0), help="Leave out what does not fit; default none."),
    click.option("--folder", type=PATH, help="Default runs/study-STUDY."),
    click.option("--images", type=PATH, help="Folder of Fashion-MNIST's idx files; default Debian's."),
)


def what_to_run(function: Callable[..., None]) -> Callable[..., None]:
    """The options that `plan` and `run` share."""
    for option in reversed(OPTIONS):
        function = option(function)
    return function


@click.group(context_settings=CONTEXT)
def study() -> None:
    """A small comparison of Mirai with its baseline and its ablations, on digits or Fashion-MNIST, with statistics.

    \b
    Example:
      mirai-ds study plan fashion --budget-hours 1.5     what would be run, how long
      mirai-ds study run fashion --budget-hours 1.5      run it; given again it goes on
      mirai-ds study rows runs/study-fashion --out docs  its raw rows
      mirai-ds study write docs                          tables, curves and text from the rows
    """


@study.command()
@what_to_run
@mistakes_in_one_line
def plan(
    name: str, arms: str | None, seeds: int | None, budget_hours: float | None, folder: Path | None,
    images: Path | None,
) -> None:  # fmt: skip
    """Measure what a step of each arm costs and print what would be run.

    \b
    Example:
      mirai-ds study plan digits --arms main --budget-hours 0.5
    """
    from mirai_ds.study.arms import choose_arms, find_study
    from mirai_ds.study.running import device_kind, known_costs, make_plan, ready

    chosen, known = find_study(name), choose_arms(arms)
    where = folder or Path(f"runs/study-{name}")
    ready(chosen, where, known, images, click.echo)
    costs = known_costs(chosen, where, known, click.echo)
    work = make_plan(chosen, where, costs, known, seeds, _seconds(budget_hours))
    for title, runs in (("run", work.chosen), ("left out", work.left_out)):
        for planned, seconds in runs:
            ratio = costs[planned.arm.name]["ratio"]
            click.echo(f"{title:9} {planned.name:18} {seconds:5.0f} s  step {ratio:.2f} of the baseline's")
    for planned in work.done:
        click.echo(f"{'done':9} {planned.name}")
    click.echo(f"{len(work.chosen)} runs, {work.seconds / 3600:.2f} hours of {device_kind()} time on this machine")


@study.command()
@what_to_run
@mistakes_in_one_line
def run(
    name: str, arms: str | None, seeds: int | None, budget_hours: float | None, folder: Path | None,
    images: Path | None,
) -> None:  # fmt: skip
    """Run arms and seeds one after the other and measure each; kill it at any time, given again it goes on.

    \b
    Example:
      OMP_NUM_THREADS=1 taskset -c 1 mirai-ds study run digits
    """
    from mirai_ds.study.arms import choose_arms, find_study
    from mirai_ds.study.running import run_study

    chosen, known = find_study(name), choose_arms(arms)
    done = run_study(
        chosen, folder or Path(f"runs/study-{name}"), known, seeds, _seconds(budget_hours), images,
        lambda text: click.echo(text),
    )  # fmt: skip
    if done.left_out:
        click.echo(f"left out: {', '.join(planned.name for planned, _ in done.left_out)}")


def _seconds(hours: float | None) -> float | None:
    return None if hours is None else hours * 3600


@study.command()
@click.argument("folders", nargs=-1, required=True, type=PATH, metavar="FOLDER...")
@click.option("--out", type=PATH, default=Path("docs"), show_default=True, help="Folder of the rows.")
@click.option("--no-pictures", is_flag=True, help="Leave samples and feature maps alone.")
@mistakes_in_one_line
def rows(folders: tuple[Path, ...], out: Path, no_pictures: bool) -> None:
    """Collect the raw rows of studies' folders, and pictures of their runs' samples and features.

    \b
    Example:
      mirai-ds study rows runs/study-digits runs/study-fashion --out docs
    """
    from mirai_ds.study.running import collect

    for line in collect(list(folders), out, not no_pictures):
        click.echo(line)


@study.command()
@click.argument("folder", type=PATH, default=Path("docs"))
@click.option("--check", is_flag=True, help="Write nothing; exit 1 when the text is not what the rows give.")
@mistakes_in_one_line
def write(folder: Path, check: bool) -> None:
    """Write tables and curves of FOLDER/study.md (default docs) from the rows beside it.

    \b
    Example:
      mirai-ds study write docs --check
    """
    from mirai_ds.study.document import write_document

    changed = write_document(folder, check)
    click.echo("\n".join(f"changed: {one}" for one in changed) or "nothing changed")
    if check and changed:
        raise SystemExit(1)

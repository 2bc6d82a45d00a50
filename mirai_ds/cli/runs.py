"""`mirai-ds compare` and `inspect`: what runs and stores hold.  Heavy modules are imported inside the verbs."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from mirai_ds.cli.errors import CONTEXT, mistakes_in_one_line
from mirai_ds.cli.output import JSON, PATH, print_json, print_parts


@click.command(context_settings=CONTEXT)
@click.argument("run_a", type=PATH)
@click.argument("run_b", type=PATH)
@click.option("--tolerance", type=float, default=0.0, show_default=True, metavar="REL",
              help="Largest |a-b| / max(|a|, |b|) of a value; 0 = equal to the last digit.")  # fmt: skip
@click.option("--metric", "metrics", multiple=True, metavar="NAME", help="Compare only this one; repeatable.")
@click.option(
    "--from", "from_step", type=click.IntRange(min=0), default=0, metavar="STEP", help="Leave out earlier steps."
)
@click.option("--csv", "table", type=PATH, metavar="FILE", help="Write every compared value, side by side.")
@JSON
@mistakes_in_one_line
def compare(run_a: Path, run_b: Path, tolerance: float, metrics: tuple[str, ...], from_step: int, table: Path | None,
            as_json: bool) -> None:  # fmt: skip
    """Say whether two runs are the same curve; exit 0 when they are, 1 when not.

    RUN_A and RUN_B are run folders, or metrics.jsonl files.  Speed and memory are left out.  What differs in settings,
    versions, code and ranks is listed, with a note when it explains the difference.  For runs that are not meant to be
    equal, such as two seeds, look at the last quarter, where noise is averaged out.

    \b
    Example:
      mirai-ds compare runs/digits-mirai-e runs/digits-mirai-e.old-1
      mirai-ds compare reference.jsonl runs/mine --tolerance 0.02 --metric held_out/ntp_ema
    """
    from mirai_ds.analysis import compare_report as report
    from mirai_ds.analysis.compare import compare_runs

    result = compare_runs(run_a, run_b, tolerance, metrics, from_step)
    written = None if table is None else report.write_csv(result, table)
    if as_json:
        print_json(report.as_json(result))
    else:
        print_parts(report.render(result), width=120)
        if written is not None:
            click.echo(f"{table}: {written} values")
    sys.exit(1 if result.verdict == "different" else 0)


@click.command(context_settings=CONTEXT)
@click.argument("path", type=PATH)
@click.option("--verify", is_flag=True, help="Read everything and compare digests; exit 1 when something is damaged.")
@JSON
@mistakes_in_one_line
def inspect(path: Path, verify: bool, as_json: bool) -> None:
    """Say what a run folder, or a token or image store, holds.  Nothing in it is changed.

    Of a run: settings, starts, newest values, every checkpoint, and where --resume auto would continue.  Without
    --verify checkpoints are judged by their sizes.

    \b
    Example:
      mirai-ds inspect runs/digits-mirai-e --verify
      mirai-ds inspect stores/codes-256 --verify
    """
    from mirai_ds.analysis.inspect_run import kind_of

    damages = _run(path, verify, as_json) if kind_of(path) == "run" else _store(path, verify, as_json)
    for damage in damages if verify else []:
        click.echo(f"mirai-ds: error: {damage}", err=True)
    sys.exit(1 if verify and damages else 0)


def _run(path: Path, verify: bool, as_json: bool) -> list[str]:
    from mirai_ds.analysis import inspect_report
    from mirai_ds.analysis.inspect_run import inspect_run

    report = inspect_run(path, verify)
    if as_json:
        print_json(inspect_report.as_json(report))
    else:
        print_parts(inspect_report.render(report), width=120)
    return report.damages


def _store(path: Path, verify: bool, as_json: bool) -> list[str]:
    from mirai_ds.analysis.inspect_store import inspect_store, store_as_json

    if as_json:
        content = store_as_json(path, verify)
        print_json(content)
        return list(content["damages"])
    lines, damages = inspect_store(path, verify)
    click.echo("\n".join(lines))
    return damages

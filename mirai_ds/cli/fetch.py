"""`mirai-ds fetch`: files of others that the project reads, by short names."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import click

from mirai_ds.cli.errors import CONTEXT, mistakes_in_one_line

NO_NETWORK = 3  # exit code


@click.command(context_settings=CONTEXT)
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--to", "folder", type=click.Path(path_type=Path), default=".", show_default=True, help="Their folder.")
@click.option("--urls", is_flag=True, help="Only say where the files are and what they must be called here.")
@mistakes_in_one_line
def fetch(names: tuple[str, ...], folder: Path, urls: bool) -> None:
    """Fetch published files; without a NAME, list them.

    A file that was cut goes on where it was; a file that is there is compared with its digest.  Where the network
    cannot be reached, exit code 3, and the addresses to fetch them by hand.

    \b
    Example:
      mirai-ds fetch
      mirai-ds fetch vq16 inception adm-reference --to weights
      mirai-ds fetch vq16 dinov2-b --to weights --urls
    """
    from mirai_ds.config.errors import UserError, nearest
    from mirai_ds.runtime.published_files import PUBLISHED

    for name in names:
        if name not in PUBLISHED:
            raise UserError(f"{name}: no such file is known; {nearest(name, PUBLISHED)}")
    if not names:
        _list()
    elif urls:
        click.echo("\n".join(by_hand(names, folder)))
    else:
        _fetch_all(names, folder)


def _list() -> None:
    from mirai_ds.runtime.published_files import PUBLISHED

    wide = max(map(len, PUBLISHED))
    for name, file in PUBLISHED.items():
        known = "" if file.sha256 else " (no sha256 known)"
        click.echo(f"{name:{wide}}  {file.size_in_words:>8}  {file.what}: {file.name}{known}")


def by_hand(names: tuple[str, ...], folder: Path) -> list[str]:
    """Lines that say what to bring: address, name here, size, digest."""
    from mirai_ds.runtime.published_files import PUBLISHED

    lines = []
    for name in names:
        file = PUBLISHED[name]
        lines += [
            file.url,
            f"  as {folder / file.name} ({file.size_in_words}, sha256 {file.sha256 or 'not known'})",
        ]
    return lines


def _show(bar: Any, task: Any, here: int, total: int | None) -> None:
    bar.update(task, completed=here, total=total)


def _fetch_all(names: tuple[str, ...], folder: Path) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    from mirai_ds.runtime.download import NoNetworkError, fetch
    from mirai_ds.runtime.published_files import PUBLISHED

    for number, name in enumerate(names):
        file = PUBLISHED[name]
        columns = (name, BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
            task = bar.add_task(name, total=file.size)
            try:
                path, digest, before = fetch(file, folder, partial(_show, bar, task))
            except NoNetworkError as error:
                click.echo(f"mirai-ds: error: {error}; fetch on a machine with a network and copy:", err=True)
                click.echo("\n".join(by_hand(names[number:], folder)), err=True)
                sys.exit(NO_NETWORK)
        checked = "as published" if file.sha256 else "none is known to compare with"
        click.echo(f"{path}: {'was there' if before else 'fetched'}, sha256 {digest}, {checked}")

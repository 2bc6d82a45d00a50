"""What verbs share of their options, of what they print and of how they start.  Heavy modules are imported inside."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import RenderableType

    from mirai_ds.runtime.distributed import World

PATH = click.Path(path_type=Path)
METHODS = ("none", "mirai-e", "mirai-i")
JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")


def print_parts(parts: list[RenderableType], width: int = 150) -> None:
    """Tables and sentences, as wide as the terminal; `width` columns where there is none."""
    from rich.console import Console
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else width, highlight=False)
    for part in parts:
        console.print(part, soft_wrap=isinstance(part, Text))  # sentences stay one line, for grep


def print_json(value: dict[str, Any]) -> None:
    """One JSON object; NaN is refused."""
    click.echo(json.dumps(value, indent=1, allow_nan=False))


def world_or_launch(verb: str, ranks: int | None) -> World:
    """This process's place among the ranks, its log started.  Where nobody launched this process and there is work
    for more than one rank, this same command is launched on all of them, and then the process exits."""
    from mirai_ds.runs.outcome import exit_code
    from mirai_ds.runtime.launch import launch, visible_gpus
    from mirai_ds.runtime.launcher import World, check_asked, recognise
    from mirai_ds.runtime.log import start_log
    from mirai_ds.runtime.processes import watch_starter

    found = recognise()
    check_asked(ranks, found)
    world = found.world
    if world is None:
        gpus = visible_gpus()
        count = ranks or max(gpus, 1)
        if count > 1:
            arguments = sys.argv[1:]
            code = launch(f"mirai_ds.cli.{verb}", arguments[arguments[:1] == [verb] :], count, gpus)
            sys.exit(exit_code(None, code))
        world = World(0, 0, 1, 1)
    else:
        watch_starter(lambda _: os._exit(75))  # what is finished stays, and a later start does the rest
    start_log(world.rank)
    return world
